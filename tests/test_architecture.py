"""Dependencies point one way: config, ops <- nn <- targets, checkpoint <- patch <- distill, generate, ... <- cli."""

import ast
import graphlib
import sys
from pathlib import Path

import sd_hyena

ROOT = Path(sd_hyena.__file__).parent
LAYER = {
    "arguments": 0,
    "config": 0,
    "errors": 0,
    "extras": 0,
    "figures": 1,
    "files": 0,
    "interrupts": 0,
    "finite": 0,
    "strict_json": 0,
    "names": 0,
    "settings": 0,
    "texts": 0,
    "ops": 0,
    "long_prompts": 1,
    "picture_files": 0,
    "placement": 1,
    "processes": 0,
    "tensors": 1,
    "recipes": 0,
    "sources": 1,
    "nn": 1,
    "grid": 1,
    "hyena_attention": 3,
    "targets": 1,
    "families": 2,
    "hyena_file": 2,
    "layer_choice": 3,
    "likeness": 0,
    "picture_settings": 1,
    "hosts": 6,
    "legacy": 3,
    "checkpoint": 4,
    "fingerprint": 2,
    "models": 3,
    "patch": 4,
    "combine": 5,
    "flops": 3,
    "api": 5,
    "generate": 6,
    "share": 7,
    "machine": 1,
    "benchmark": 7,
    "distill": 7,
    "evaluate": 8,
    "anatomy": 9,
    "demo": 9,
    "compare": 9,
    "ui": 10,
    "cli": 11,
}
# The bundled model's prompts and scorer are data to the layers below it.
ALLOWED = {("distill", "demo"), ("evaluate", "demo")}
DIFFUSERS_USERS = {
    "hyena_attention.py",
    "generate/hires.py",
    "generate/samplers.py",
    "models/folders.py",
    "models/hub.py",
    "models/loading.py",
    "models/parts.py",
    "models/quiet.py",
    "models/random_weights.py",
    "models/schedule.py",
    "models/single_file.py",
    "distill/data.py",
    "distill/optimisation.py",
    "distill/state.py",
    "evaluate/inputs.py",
    "evaluate/yardstick.py",
    "benchmark/image.py",
}


FOUNDATIONS = {"arguments", "errors", "finite", "interrupts", "settings", "texts"}  # below even what needs no torch


def imports(path):
    """(module, level) of every import in a file, whole module paths."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.module, node.level
            else:
                yield from ((alias.name, node.level) for alias in node.names)


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def internal(path):
    depth = len(path.relative_to(ROOT).parts)
    for module, level in imports(path):
        if level and level >= depth:
            yield module.split(".")[0]
        elif not level and module.startswith("sd_hyena."):
            yield module.split(".")[1]


def files():
    return [p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem not in ("__init__", "__main__")]


def test_every_room_has_a_place():
    assert {room(p) for p in files()} == set(LAYER)


def test_dependencies_point_one_way():
    for path in files():
        for other in internal(path):
            if other in LAYER and other != room(path) and (room(path), other) not in ALLOWED:
                assert LAYER[other] < LAYER[room(path)] or other in FOUNDATIONS, (
                    f"{path.relative_to(ROOT)} imports {other}"
                )


def module_of(path):
    """A file's module, as parts of its name below the package; a package's file is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def statements(node):
    """All within a node but what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from statements(child)


def imported_files(path, modules):
    """Modules of this package that a file imports, at its top or in functions; a name taken from a package is the
    module of that name if there is one."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name.split(".") for alias in node.names]
            yield from (tuple(parts[1:]) for parts in named if parts[0] == ROOT.name)
        elif isinstance(node, ast.ImportFrom):
            parts = tuple(node.module.split(".") if node.module else ())
            if node.level:
                base = package[: len(package) - node.level + 1] + parts
            elif parts[0] == ROOT.name:
                base = parts[1:]
            else:
                continue
            for alias in node.names:
                yield (*base, alias.name) if (*base, alias.name) in modules else base


def test_no_file_imports_itself_by_way_of_others():
    modules = {module_of(path): path for path in ROOT.rglob("*.py")}
    graph = {module: set(imported_files(path, modules)) - {module} for module, path in modules.items()}
    assert graph["nn",] >= {("nn", "operator"), ("config",)}
    assert set().union(*graph.values()) <= set(modules)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join(".".join(module) or ROOT.name for module in error.args[1])
        raise AssertionError(f"imports go round in a circle: {circle}") from None


def test_ops_and_nn_need_torch_only():
    for path in [*(ROOT / "ops").rglob("*.py"), *(ROOT / "nn").rglob("*.py")]:
        # Triton is in the kernels alone; what chooses them works where it is missing.
        allowed = {"torch"} | ({"triton"} if path.stem == "kernels" else set()) | sys.stdlib_module_names
        foreign = {m.split(".")[0] for m, level in imports(path) if not level} - allowed
        assert not foreign, f"{path.name} imports {foreign}"


def test_diffusers_is_imported_in_few_places():
    users = {
        str(p.relative_to(ROOT))
        for p in ROOT.rglob("*.py")
        if any(m.split(".")[0] == "diffusers" for m, _ in imports(p))
    }
    assert users <= DIFFUSERS_USERS


def test_files_can_be_read_at_a_sitting():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path

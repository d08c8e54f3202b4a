"""Dependencies point one way: ops <- nn <- targets, checkpoint <- patch <- distill, generate, ... <- cli."""

import ast
import sys
from pathlib import Path

import sd_hyena

ROOT = Path(sd_hyena.__file__).parent
LAYER = {
    "errors": 0,
    "files": 0,
    "names": 0,
    "settings": 0,
    "ops": 0,
    "recipes": 0,
    "nn": 1,
    "targets": 2,
    "hyena_file": 2,
    "legacy": 3,
    "checkpoint": 4,
    "models": 3,
    "patch": 4,
    "api": 5,
    "generate": 6,
    "machine": 1,
    "benchmark": 7,
    "distill": 7,
    "evaluate": 8,
    "anatomy": 9,
    "demo": 9,
    "cli": 10,
}
# The bundled model's prompts and scorer are data to the layers below it.
ALLOWED = {("distill", "demo"), ("evaluate", "demo")}
DIFFUSERS_USERS = {
    "models.py",
    "generate/draw.py",
    "distill/data.py",
    "distill/optimisation.py",
    "distill/state.py",
    "evaluate/inputs.py",
    "evaluate/yardstick.py",
    "benchmark/image.py",
}


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
                assert LAYER[other] < LAYER[room(path)] or other == "errors", (
                    f"{path.relative_to(ROOT)} imports {other}"
                )


def test_ops_and_nn_need_torch_only():
    for path in [*(ROOT / "ops").rglob("*.py"), *(ROOT / "nn").rglob("*.py")]:
        # Triton is in the kernels alone; what chooses them works where it is missing.
        allowed = {"torch"} | ({"triton"} if path.parent.name == "kernels" else set()) | sys.stdlib_module_names
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

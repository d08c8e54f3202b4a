"""Writes docs/compatibility.md from the tests: ``python tests/compatibility.py``.

A row is a mark on a test: ``@pytest.mark.compatibility(area, what, outcome)``, all three literal strings.
"""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "compatibility.md"
AREAS = {
    "Models": "What `-m` takes, and what is said of files that are something else",
    "Samplers": "`--scheduler`, `--prediction_type`, `--zero_snr`",
    "Pipelines": "diffusers pipelines with Hyena layers loaded",
    "LoRA": "LoRA and other changes of weights",
    "ComfyUI": "ComfyUI, by its node (on a stand-in of it; the same in a real one where `COMFYUI_DIR` names a tree)",
    "Hosts": "Offloading, casting, compiling, processors and other speed-ups",
    "Hyena files": "Loading, sharing and combining Hyena layers",
    "High resolution": "Large pictures",
    "Prompts and paths": "Prompts, data and paths",
}
HEAD = """# What works with what

Each row is held by the test named in it; the table is written from those tests by `python tests/compatibility.py`.
Tested with diffusers 0.42.1, transformers 5.23.0, peft {peft} and torch 2.13.0.
"""


def rows() -> dict[str, list[tuple[str, str, str]]]:
    """By area: what, outcome, and the test that holds it."""
    found: dict[str, list[tuple[str, str, str]]] = {area: [] for area in AREAS}
    for path in sorted(TESTS.rglob("test_*.py")):
        for test in ast.parse(path.read_text()).body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                for call in (node for decorator in test.decorator_list for node in ast.walk(decorator)):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.compatibility":
                        area, what, outcome = map(ast.literal_eval, call.args)
                        found[area].append((what, outcome, f"{path.relative_to(TESTS)}::{test.name}"))
    return found


def page() -> str:
    versions = (TESTS.parent / "constraints.txt").read_text()
    peft = next(line.split("==")[1].split()[0] for line in versions.splitlines() if line.startswith("peft=="))
    lines = [HEAD.format(peft=peft)]
    for area, listed in rows().items():
        if listed:
            lines += [f"## {AREAS[area]}", "", "| what | outcome | test |", "|---|---|---|"]
            lines += [f"| {what} | {outcome} | `{test}` |" for what, outcome, test in sorted(set(listed))]
            lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())

"""Versions are pinned, and their files known by their hashes."""

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = [line for line in (ROOT / "constraints.txt").read_text().replace("\\\n", "").splitlines() if line[0] != "#"]
PINNED = {canonicalize_name(pin.name): pin for pin in (Requirement(line.split("--hash")[0]) for line in LINES)}
TORCH = Requirement(re.search(r"^TORCH := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1])


def test_each_pin_has_hashes():
    form = re.compile(r"[\w.-]+==[\w.+]+( ; [^\\]+?)?(\s+--hash=sha256:[0-9a-f]{64})+")
    assert len(LINES) > 50
    assert [line for line in LINES if not form.fullmatch(line)] == []


def test_each_dependency_is_pinned_within_its_bounds():
    """The metrics extra has none: its torchvision is one of torch's builds, and nothing here installs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    texts = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *extras["bench"],
        *extras["dev"],
    ]
    pinned = {name: next(iter(pin.specifier)).version for name, pin in (PINNED | {"torch": TORCH}).items()}
    for wanted in map(Requirement, texts):
        name = canonicalize_name(wanted.name)
        assert name == "sd-hyena" or pinned[name] in wanted.specifier, wanted


@pytest.mark.skipif(not Path(sys.prefix, "installed").exists(), reason="make did not make this environment")
def test_what_is_installed_is_what_is_pinned():
    for name, pin in PINNED.items():
        if pin.marker is None or pin.marker.evaluate():
            assert version(name) in pin.specifier
    assert version("torch").partition("+")[0] in TORCH.specifier

"""What README and docs say exists: files, commands with their options, names of the API, and an order to read in."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from test_architecture import LAYER

import sd_hyena
from sd_hyena import cli, extras

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "comfyui" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "src" / "sd_hyena"


def blocks(language):
    """(page, code) of all code in a language."""
    for page in PAGES:
        yield from ((page.name, code) for code in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))


def commands():
    """(page, words) of every line of a shell that starts sd-hyena."""
    for page, code in blocks("bash"):
        for line in code.replace("\\\n", "").splitlines():
            if line.startswith("sd-hyena "):
                yield pytest.param(shlex.split(line, comments=True)[1:], id=f"{page}: {line[:60]}")


def test_the_readme_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 116
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = "\n\n".join(part for part in prose.split("\n\n") if not part.startswith(("|", "#", "!", "[", "- ")))
    sentences = re.split(r"(?<=[.:?!])\W*\s+", prose.replace("\n", " "))
    assert [sentence for sentence in sentences if len(sentence.split()) > 30] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_page_is_linked():
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        if not target.startswith("http")
    }
    assert [page.name for page in PAGES[1:] if page not in linked] == []


@pytest.mark.parametrize("words", commands())
def test_commands_have_these_options(words, monkeypatch):
    module = importlib.import_module(f"sd_hyena.cli.{words[0]}")
    taken = []
    monkeypatch.setattr(module, "run", lambda args: taken.append(args) or 0)
    monkeypatch.setattr(extras, "require", lambda *args: None)
    assert cli.main(words) == 0
    assert len(taken) == 1


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_the_python_api_is_as_written(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sd_hyena":
            assert hasattr(sd_hyena, node.attr), f"{page}: sd_hyena.{node.attr}"


def test_the_code_is_read_from_below():
    """Rows name files and folders that exist, and none stands on a row further down."""
    table = (ROOT / "README.md").read_text().partition("## Read the code")[2]
    lowest = -1
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", row)
        assert all((PACKAGE / name).exists() for name in names), row
        rooms = {name.split("/")[0].removesuffix(".py") for name in names}
        level = max(LAYER[room] for room in rooms)
        assert level >= lowest, row
        lowest = level

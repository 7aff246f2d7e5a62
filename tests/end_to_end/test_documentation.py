"""README and docs: commands that can be parsed, links that lead somewhere, modules and functions that exist."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from d2q_edge.cli import cli
from tests.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)")
"""A relative link: the path, empty for the page itself, and the heading's anchor."""
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def commands() -> list[tuple[str, str]]:
    """Every line of the shell blocks that calls us, and the page it is on."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.match(r"(?:time )?d2q-edge (.*)", line.strip()):
                    found.append((page.name, match[1]))
    return found


def test_there_are_commands() -> None:
    assert {page for page, _ in commands()} >= {"README.md", "measuring.md"}
    assert {line.split()[0] for _, line in commands()} >= {"convert", "eval", "compare", "bench", "chat", "serve"}


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_are_ours(page: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    command: click.Command = cli.commands[name]
    # A command keeps the help option that it is first asked for, and the parent's context says what that is.
    parent = click.Context(cli, **cli.context_settings)
    if isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    # Raises where there is no such option, or an argument is missing.
    command.make_context(name, arguments, parent=parent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


def tree() -> tuple[set[Path], set[Path]]:
    """Folders and files in the tree of the architecture page, and those that it names without saying where they are.

    An entry's place follows from its indentation. Lines are entries, or go on with their folder's.
    """
    match = re.search(r"^```\n(d2q_edge/.*?)^```", ARCHITECTURE.read_text(), re.MULTILINE | re.DOTALL)
    assert match, "the page has no block that begins with d2q_edge/"
    entries: set[Path] = set()
    mentioned: set[Path] = set()
    folders: list[tuple[int, Path]] = []
    for line in match[1].splitlines():
        text = line.lstrip(" │├└─")
        indent = len(line) - len(text)
        while folders and folders[-1][0] >= indent:
            folders.pop()
        place = folders[-1][1] if folders else ROOT
        if folder := re.match(r"((?:\w+/)+)(?:\s|$)", text):
            place /= folder[1]
            folders.append((indent, place))
            entries.add(place)
        for name in re.findall(r"(?:\w+/)*\w+\.(?:py|txt)\b", text):
            (entries if (place / name).exists() else mentioned).add(place / name)
    return entries, mentioned


def test_the_tree_is_complete() -> None:
    """Every package and every module is in the architecture page's tree, at its place."""
    package = ROOT / "d2q_edge"
    modules = {file for file in package.rglob("*.py") if not file.name.startswith("__")}
    packages = {file.parent for file in package.rglob("__init__.py")}
    assert len(modules) > 100
    assert {str(path.relative_to(ROOT)) for path in (packages | modules) - tree()[0]} == set()


def test_the_tree_names_nothing_else() -> None:
    """Its folders exist; other names in it are those of files in other folders, which it may refer to."""
    entries, mentioned = tree()
    assert [str(path) for path in entries if not path.exists()] == []
    names = {str(path.relative_to(ROOT / "d2q_edge")) for path in (ROOT / "d2q_edge").rglob("*.*")}
    names |= {Path(name).name for name in names}
    assert [str(path) for path in mentioned if not {path.name, str(path.relative_to(ROOT))} & names] == []


def test_functions_are_where_the_architecture_page_says() -> None:
    """[pipeline/block.py](../d2q_edge/pipeline/block.py) `name` or `Class.name`: that module has it."""
    found = re.findall(r"\]\(\.\./(d2q_edge/[\w/]+)\.py\)\s+`([\w.]+)`", ARCHITECTURE.read_text())
    assert len(found) >= 10
    for path, name in found:
        value: Any = importlib.import_module(path.replace("/", "."))
        for part in name.split("."):
            assert hasattr(value, part), f"{path}.py has no {name}"
            value = getattr(value, part)
        assert value.__module__ == path.replace("/", "."), f"{name} is imported by {path}.py, but not defined there"

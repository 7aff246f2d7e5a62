"""README and docs: commands that can be parsed, links that lead somewhere, files that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from d2q_edge.cli import cli
from tests.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


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
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_tree_is_complete() -> None:
    """Every file and folder of the package is named in README's tree, and what the tree names is there."""
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("```\nd2q_edge/") : text.index("cpp_patch/           the patch series")]
    names = set(re.findall(r"[\w]+\.(?:py|txt)|\w+/", tree))
    there = {entry.name + "/" * entry.is_dir() for entry in (ROOT / "d2q_edge").iterdir()}
    there |= {file.name for file in (ROOT / "d2q_edge").rglob("*.py")}
    assert names - there - {"d2q_edge/"} == set()
    own = {entry.name + "/" * entry.is_dir() for entry in (ROOT / "d2q_edge").iterdir() if entry.name[0] not in "._"}
    assert own - names - {"__pycache__/", "py.typed"} == set()

"""The README says what the code does: flags, file tree, make targets.

`python tests/test_readme.py` writes the tables of flags anew.
"""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SCRIPTS = ("train", "interact", "convai_evaluation")

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from cli import ArgumentParser  # noqa: E402


class Captured(Exception):
    """Carries a script's parser out of its `parse_args`."""


def capture(parser: ArgumentParser, argv: list[str] | None = None):
    raise Captured(parser)


def flag_table(script: str) -> str:
    """A script's flags as a table, from its parser."""
    original, ArgumentParser.parse_args = ArgumentParser.parse_args, capture
    try:
        importlib.import_module(script).parse_args([])
    except Captured as captured:
        (parser,) = captured.args
    finally:
        ArgumentParser.parse_args = original
    lines = ["| flag | default | what it does |", "|---|---|---|"]
    for action in parser._actions[1:]:  # all but --help
        names = " ".join(f"`{name}`" for name in action.option_strings)
        unset = action.default is None or action.default is False or action.default == ""
        default = "" if unset else f"`{action.default}`"
        choices = f" ({', '.join(f'`{choice}`' for choice in action.choices if choice)})" if action.choices else ""
        lines.append(f"| {names} | {default} | {action.help}{choices} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The README with the flag tables as they should be."""
    for script in SCRIPTS:
        start, end = f"<!-- flags: {script}.py -->\n", f"<!-- end of flags: {script}.py -->"
        head, rest = text.split(start)
        text = f"{head}{start}{flag_table(script)}\n{end}{rest.split(end)[1]}"
    return text


def test_flags():
    assert with_tables(README.read_text()) == README.read_text()


def test_tree():
    described = set(re.findall(r"^([a-z_]+\.py) ", README.read_text(), re.MULTILINE))
    assert described == {path.name for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("kind", ["make targets", "files"])
def test_what_is_named_exists(kind):
    text = README.read_text()
    if kind == "make targets":
        targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
        assert named and named <= set(targets)
    else:
        named = set(re.findall(r"\]\(([^)#:]+)\)", text)) | set(re.findall(r"`((?:example|benchmarks)/[\w./]+)`", text))
        assert named and not [name for name in named if not (ROOT / name).exists()]


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))

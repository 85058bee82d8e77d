"""The tree holds together: pinned requirements, declared imports, and imports that go one way."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers import ROOT

# Each module of the project and the modules of the project that it may import; each stands below those it imports.
MAY_IMPORT = {
    "cli": set(),
    "example_entry": set(),
    "files": set(),
    "metrics": {"files"},
    "tokenization": set(),
    "download": {"cli"},
    "distractors": set(),
    "formats": {"cli", "files"},
    "dialogs": {"cli", "distractors", "formats"},
    "utils": {"cli", "dialogs", "download", "files", "formats", "tokenization"},
    "inputs": {"cli", "utils"},
    "gpt": set(),
    "heads": {"cli", "gpt"},
    "lora": {"cli"},
    "precision": {"cli"},
    "model": {"cli", "files", "heads", "inputs", "lora", "precision", "utils"},
    "decoding": {"cli", "inputs", "model", "utils"},
    "evaluation": {"cli", "decoding", "inputs", "metrics", "model", "tokenization", "utils"},
    "parlai_agent": {"cli", "dialogs", "evaluation", "formats", "metrics", "model", "tokenization", "utils"},
    "distribution": {"cli"},
    "checkpoints": {"cli", "files"},
    "engines": {"inputs", "precision"},
    "handlers": {"checkpoints", "cli", "distribution", "engines", "precision"},
    "train": {
        "checkpoints", "cli", "distribution", "engines", "files", "handlers", "inputs", "lora", "model", "precision",
        "utils",
    },
    "chat": {"cli", "decoding", "files", "inputs", "model", "tokenization", "utils"},
    "interact": {"chat", "cli", "decoding", "dialogs", "download", "inputs", "model", "utils"},
    "backends": {"cli", "dialogs", "evaluation", "formats", "inputs", "metrics", "model", "utils"},
    "convai_evaluation": {"backends", "cli", "files", "parlai_agent"},
}
AROUND = ("tests", "benchmarks", "example", "figures")  # folders whose code may use the development requirements
# Imported where they are used and installed on demand; the two ParlAIs cannot share an environment.
OPTIONAL = {"apex", "parlai", "peft", "projects"}


def imported(path: Path, lazy: bool = True) -> set[str]:
    """The top-level modules that a file imports; without `lazy` only those imported outside of functions."""
    names, waiting = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names


def third_party(paths: Iterable[Path]) -> set[str]:
    """The top-level modules these files import that are neither Python's nor the project's nor optional."""
    own = {path.stem for folder in AROUND for path in (ROOT / folder).glob("*.py")} | set(MAY_IMPORT) | set(AROUND)
    return {name for path in paths for name in imported(path)} - own - OPTIONAL - set(sys.stdlib_module_names)


def requirements(name: str) -> dict[str, str]:
    """Distribution (lower case) -> the line that asks for it, of a requirements file and those it includes."""
    lines = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            lines |= requirements(line[3:].strip())
        elif line and not line.startswith("#"):
            lines[re.split(r"[^\w.-]", line)[0].lower()] = line
    return lines


def distributions(modules: set[str]) -> set[str]:
    """The installed distributions (lower case) that provide these top-level modules."""
    providers = importlib.metadata.packages_distributions()
    return {providers.get(module, [module])[0].lower() for module in modules}


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_pins_are_exact(path):
    loose = [line for line in requirements(path.name).values() if not re.match(r"[\w.-]+==\d[\w.]*(;|$)", line)]
    assert not loose


def test_modules_are_listed():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_go_one_way(module):
    assert imported(ROOT / f"{module}.py") & set(MAY_IMPORT) <= MAY_IMPORT[module]


def test_allowed_imports_have_no_cycle():
    modules = list(MAY_IMPORT)
    for place, module in enumerate(modules):
        assert MAY_IMPORT[module] <= set(modules[:place]), module


def test_only_the_trainer_loads_ignite():
    """The chat and the evaluation start without the time that ignite and tensorboardX take to load."""
    loading = {path.stem for path in ROOT.glob("*.py") if imported(path, lazy=False) & {"ignite", "tensorboardX"}}
    assert loading <= {"train", "engines", "handlers", "checkpoints", "distribution"}


def test_requirements_are_what_the_project_imports():
    used = distributions(third_party(ROOT.glob("*.py")))
    assert used == set(requirements("requirements.txt"))


def test_dev_requirements_hold_what_the_rest_imports():
    used = distributions(third_party(path for folder in AROUND for path in (ROOT / folder).glob("*.py")))
    assert used <= set(requirements("requirements/dev.txt"))


def test_deprecations_of_every_module_are_errors():
    with open(ROOT / "pyproject.toml", "rb") as file:
        filters = tomllib.load(file)["tool"]["pytest"]["ini_options"]["filterwarnings"]
    for line in filters:
        pattern = line.split(":", 3)[3]
        assert [module for module in MAY_IMPORT if not re.match(pattern, module)] == ["example_entry"]

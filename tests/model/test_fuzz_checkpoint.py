"""A short form of `fuzz_checkpoint.py`. FUZZ=1000: so many mutants."""

import os

import pytest
from fuzz_checkpoint import main

pytest.importorskip("peft", reason="needs requirements/extra.txt")

MUTANTS = int(os.environ.get("FUZZ", 15))


def test_mutated_checkpoints_end_well(capsys):
    assert main(["--mutants", str(MUTANTS)]) == 0, capsys.readouterr().out

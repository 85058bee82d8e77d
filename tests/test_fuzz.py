"""A short form of `fuzz_dataset.py`."""

from fuzz_dataset import main


def test_mutated_datasets_end_well(capsys):
    assert main(["--mutants", "100"]) == 0, capsys.readouterr().out

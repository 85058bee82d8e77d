"""What other people's scripts import from the original is where it was, and importing a script does nothing else."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest
from helpers import ROOT

PUBLIC_NAMES = {
    "train": [
        "SPECIAL_TOKENS", "ATTR_TO_SPECIAL_TOKEN", "MODEL_INPUTS", "PADDED_INPUTS", "average_distributed_scalar",
        "pad_dataset", "add_special_tokens_", "build_input_from_segments", "get_data_loaders", "train",
    ],
    "interact": ["top_filtering", "sample_sequence", "run"],
    "utils": [
        "PERSONACHAT_URL", "HF_FINETUNED_MODEL", "download_pretrained_model", "get_dataset", "AttrDict", "make_logdir",
    ],
    "convai_evaluation": ["TransformerAgent"],
    "example_entry": ["EXAMPLE_ENTRY"],
}  # fmt: skip
# The arguments that callers give by place or by name; what is new comes after them and has a default.
ARGUMENTS = {
    "train.average_distributed_scalar": ["scalar", "args"],
    "train.pad_dataset": ["dataset", "padding"],
    "train.add_special_tokens_": ["model", "tokenizer"],
    "train.build_input_from_segments": ["persona", "history", "reply", "tokenizer", "lm_labels", "with_eos"],
    "train.get_data_loaders": ["args", "tokenizer"],
    "interact.top_filtering": ["logits", "top_k", "top_p", "threshold", "filter_value"],
    "interact.sample_sequence": ["personality", "history", "tokenizer", "model", "args", "current_output"],
    "utils.get_dataset": ["tokenizer", "dataset_path", "dataset_cache"],
    "utils.make_logdir": ["model_name"],
    "utils.download_pretrained_model": [],
}
NO_DEFAULT = inspect.Parameter.empty


@pytest.mark.parametrize("name", [f"{module}.{name}" for module, names in PUBLIC_NAMES.items() for name in names])
def test_name_is_where_it_was(name):
    module, name = name.split(".")
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_what_they_were(name):
    module, function = name.split(".")
    parameters = list(inspect.signature(getattr(importlib.import_module(module), function)).parameters.values())
    assert [parameter.name for parameter in parameters][: len(ARGUMENTS[name])] == ARGUMENTS[name]
    assert all(parameter.default is not NO_DEFAULT for parameter in parameters[len(ARGUMENTS[name]) :])


@pytest.mark.parametrize("name", ["train.train", "interact.run"])
def test_entry_functions_take_an_argument_list_or_nothing(name):
    module, function = name.split(".")
    (argv,) = inspect.signature(getattr(importlib.import_module(module), function)).parameters.values()
    assert argv.default is None


def test_constants_are_what_they_were():
    from train import ATTR_TO_SPECIAL_TOKEN, MODEL_INPUTS, PADDED_INPUTS, SPECIAL_TOKENS

    assert SPECIAL_TOKENS == ["<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>"]
    assert MODEL_INPUTS == ["input_ids", "mc_token_ids", "lm_labels", "mc_labels", "token_type_ids"]
    assert PADDED_INPUTS == ["input_ids", "lm_labels", "token_type_ids"]
    added = [ATTR_TO_SPECIAL_TOKEN[name] for name in ("bos_token", "eos_token", "pad_token")]
    assert {*added, *ATTR_TO_SPECIAL_TOKEN["additional_special_tokens"]} == set(SPECIAL_TOKENS)


IMPORT_AND_TELL = """
import json, logging, os, random, sys, threading
import httpx, numpy, torch  # httpx, which some releases of transformers load, draws a number where rich is installed
def state():
    return {
        "files": sorted(os.listdir()),
        "handlers": len(logging.getLogger().handlers), "level": logging.getLogger().level,
        "random": [random.random(), float(numpy.random.rand()), torch.rand(1).item()],
        "threads": threading.active_count(),
    }
def seed():
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
seed(); before = state(); seed()
import interact, convai_evaluation
loaded = sorted({"ignite", "tensorboardX", "parlai", "spacy", "ftfy"} & set(sys.modules))
import train, example_entry
after = state()
print(json.dumps([before, after, loaded]))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The state of a fresh process before and after it imports the scripts, and what the chat loaded."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_AND_TELL],
        cwd=tmp_path_factory.mktemp("empty"), env={"PYTHONPATH": str(ROOT), "PATH": "/nowhere", "HOME": "/nowhere"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)  # which fails too if an import printed something


@pytest.mark.slow
def test_importing_the_scripts_does_nothing_else(imported):
    """ParlAI imports the evaluation a second time, and a notebook imports them all."""
    before, after, _ = imported
    assert after == before
    assert after["files"] == []


@pytest.mark.slow
def test_the_chat_loads_neither_ignite_nor_what_it_may_not_need(imported):
    assert imported[2] == []

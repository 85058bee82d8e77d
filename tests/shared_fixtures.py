"""Fixtures of all tests: tiny models and tokenizers of several families, made here, on one thread."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, OTHERS, ROOT, dialogs_of_text, load_own, process_as_it_was, write_tokenizer
from transformers import GPT2Config, OpenAIGPTConfig

from transfertransfo.model.double_heads import add_special_tokens_
from transfertransfo.model.loading import load_model
from transfertransfo.model.lora import without_bitsandbytes
from transfertransfo.model.sources import load_tokenizer

if importlib.util.find_spec("peft"):
    with without_bitsandbytes():  # a second less
        import peft  # noqa: F401

torch.set_num_threads(1)  # tiny models gain nothing from more, and runs beside one another lose


@pytest.fixture(autouse=True)
def log_and_signals_stay():
    """A script's log went on into the stream of a test that had ended, and the error of that into the next test's."""
    with process_as_it_was():
        yield


@pytest.fixture(scope="session")
def example_json() -> dict:
    return json.loads((ROOT / "example" / "personachat.json").read_text())


@pytest.fixture(scope="session")
def base_checkpoints(tmp_path_factory, example_json) -> dict[str, Path]:
    """Folders of tiny models without weights and without the dialog tokens: what a new run starts from."""
    texts = dialogs_of_text(example_json)
    folders = {family: tmp_path_factory.mktemp(family) for family in (*FAMILIES, *OTHERS)}

    for family, folder in folders.items():
        write_tokenizer(family, texts, folder)

    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 128}
    for family, config_class in (("gpt", OpenAIGPTConfig), ("gpt2", GPT2Config)):
        size = len(load_tokenizer_files(folders[family]))
        config_class(vocab_size=size, bos_token_id=None, eos_token_id=None, **shape).save_pretrained(folders[family])
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16,
             "intermediate_size": 32, "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip
    for family, config_class in OTHERS.items():  # GPT-NeoX's embeddings are not tied; Qwen's are more than its tokens
        size = len(load_tokenizer_files(folders[family])) + 30 * (family == "qwen2")
        config = config_class(vocab_size=size, tie_word_embeddings=family != "gpt_neox", **shape)
        config.save_pretrained(folders[family])
    return folders


def load_tokenizer_files(folder: Path) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


@pytest.fixture(scope="session")
def checkpoints(base_checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny double-head models with random weights and the dialog tokens, as a run folder has them."""
    folders = {}
    for family, base in base_checkpoints.items():
        torch.manual_seed(1)
        tokenizer = load_tokenizer(base, "basic" if family == "gpt" else None)
        model = load_model(base, from_scratch=True)
        add_special_tokens_(model, tokenizer)
        for parameter in model.parameters():  # random weights at their usual scale give every reply the same score
            torch.nn.init.normal_(parameter, std=0.3)
        folders[family] = tmp_path_factory.mktemp(f"{family}-dialogs")
        model.pretrained.save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def checkpoint(family, checkpoints) -> Path:
    return checkpoints[family]


@pytest.fixture
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture
def model(checkpoint):
    """A model of the test's own."""
    return load_own(checkpoint)


@pytest.fixture(scope="session")
def gpt(checkpoints):
    return load_tokenizer(checkpoints["gpt"])


@pytest.fixture(scope="session")
def spacy_gpt(base_checkpoints):
    return load_tokenizer(base_checkpoints["gpt"])


@pytest.fixture(scope="session")
def gpt2(checkpoints):
    return load_tokenizer(checkpoints["gpt2"])

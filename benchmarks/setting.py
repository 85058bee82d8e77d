"""What all benchmarks share: the sizes, the dataset, the tokenizer, and a model of GPT's shape with random weights."""

import functools
import json
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import OpenAIGPTConfig, PreTrainedTokenizerBase

from train import parse_args
from transfertransfo.data.dataset import TokenizedDataset, load_dataset, locate_dataset
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.inputs import Example, make_examples
from transfertransfo.data.tokenization import ATTR_TO_SPECIAL_TOKEN, special_ids
from transfertransfo.decoding import Decoding
from transfertransfo.evaluation.evaluator import Turn, make_turns
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.model.gpt import OpenAIGPTDoubleHeadsModel
from transfertransfo.model.sources import load_tokenizer


class Shape(NamedTuple):
    n_layer: int
    n_embd: int
    n_head: int
    vocabulary: int = 40_483  # GPT's 40,478 and the five dialog tokens
    n_positions: int = 512


class Sizes(NamedTuple):
    """How much is measured. Each repetition is a batch of its own."""

    shape: Shape
    small: Shape
    repetitions: int
    longest: int  # tokens that the training reference is padded to
    turns: int  # dialog turns of one batch of the evaluation
    factors: tuple[int, ...]  # how often the dataset is repeated to see how the cost grows


GPT, SMALL = Shape(12, 768, 12), Shape(2, 64, 2)
FULL = Sizes(GPT, SMALL, repetitions=3, longest=280, turns=16, factors=(1, 4, 16))
QUICK = Sizes(SMALL._replace(n_layer=4), SMALL, repetitions=1, longest=280, turns=4, factors=(1, 4))

TRAINING = ["--num_candidates", "4", "--gradient_accumulation_steps", "1"]  # the paper's recipe, a step a forward
# the defaults of the evaluation, but for sampling
DECODING = Decoding(no_sample=True)


class Setting:
    """One run's dataset and tokenizer.

    Attributes:
        path: the dataset as one plain PersonaChat JSON, which the reference can read too.
        tokenizer_path: folder of a GPT tokenizer.
    """

    def __init__(self, dataset_path: str, tokenizer_path: str, folder: Path, sizes: Sizes, device: str = "cpu"):
        self.sizes, self.folder, self.device = sizes, folder, device
        self.tokenizer_path = tokenizer_path
        self.path = str(folder / "dataset.json")
        Path(self.path).write_text(json.dumps(read_dialogs(locate_dataset(dataset_path))))

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return dialog_tokenizer(self.tokenizer_path)

    @functools.cached_property
    def dataset(self) -> TokenizedDataset:
        return load_dataset(self.tokenizer, self.path, "")

    @functools.cached_property
    def model(self) -> DoubleHeads:
        return self.make_model(self.sizes.shape)

    def make_model(self, shape: Shape) -> DoubleHeads:
        """A model with random weights, without dropout until `.train()`.

        The dialog tokens' embeddings are 0, so that no reply ends before `max_length`: a random model prefers tokens of
        its input, and `<speaker1>` is added to all of it as a token type.
        """
        torch.manual_seed(0)
        config = OpenAIGPTConfig(
            n_layer=shape.n_layer, n_embd=shape.n_embd, n_head=shape.n_head,
            vocab_size=shape.vocabulary, n_positions=shape.n_positions,
        )  # fmt: skip
        model = DoubleHeads(OpenAIGPTDoubleHeadsModel(config))
        with torch.no_grad():
            model.pretrained.get_input_embeddings().get_parameter("weight")[special_ids(self.tokenizer)] = 0
        return model.to(self.device).eval()

    def examples(self, num_candidates: int = 4) -> list[Example]:
        """The training examples."""
        dialogs = self.dataset.dialogs("train", self.dataset.tokens)
        return make_examples(dialogs, 2, self.sizes.shape.n_positions, num_candidates)

    @functools.cached_property
    def turns(self) -> list[Turn]:
        """The validation's turns."""
        tokens, texts = (self.dataset.dialogs("valid", of) for of in (self.dataset.tokens, self.dataset.texts))
        return make_turns(tokens, texts, max_history=2)


def dialog_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """GPT's tokenizer with the dialog tokens, its text split without spaCy, as the original did in effect."""
    tokenizer = load_tokenizer(folder, "basic")
    tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    return tokenizer


def training_args(path: str = "", cache: str = "") -> Namespace:
    args, _ = parse_args([*TRAINING, "--dataset_path", path, "--dataset_cache", cache])
    return args


def spread(items: list, count: int) -> list:
    """`count` items, evenly spread over a list in order of size: as long and short ones as there are."""
    return [items[int((i + 0.5) / count * len(items))] for i in range(count)]

"""Replies of a model in training to a few turns of its dataset, to be read by whoever trains it."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.inputs import Example
from transfertransfo.data.tokenization import text_of
from transfertransfo.decoding import Context, Decoding, generate
from transfertransfo.errors import printable
from transfertransfo.model.double_heads import DoubleHeads

DECODING = Decoding(no_sample=True)  # the likeliest words: two validations differ by what was learnt alone


def choose_turns(examples: Sequence[Example], count: int = 3) -> list[Example]:
    """So many of the examples, at even distances from the first to the last."""
    count = min(count, len(examples))
    return [examples[i * (len(examples) - 1) // max(count - 1, 1)] for i in range(count)]


def reply_to_turns(
    model: DoubleHeads, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[dict[str, str]]:
    """The likeliest reply to each example as text: `heard` ("" where the model opens the dialog), `reply`, `gold`.

    Nothing is drawn and dropout is off, so that training goes on with the random state that it had. A model that is
    compiled is not compiled anew for replies.
    """
    training = model.training
    model.eval()
    contexts = [Context(example.persona, example.history) for example in examples]
    with torch.compiler.set_stance("force_eager"):
        replies = generate(model, contexts, tokenizer, DECODING)
    model.train(training)

    def shown(ids: list[int]) -> str:
        return " ".join(printable(text_of(tokenizer, ids)).split())

    return [
        {
            "heard": shown(example.history[-1]) if example.history else "",
            "reply": shown(reply),
            "gold": shown(example.candidates[-1]),
        }
        for example, reply in zip(examples, replies)
    ]

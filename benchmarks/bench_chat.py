"""A chat's reply, one row: 20 tokens after 120. Each token reads every weight once, so memory is the limit."""

import functools
import itertools
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks import reference
from benchmarks.measure import Seconds, check_equal, figure, in_turn, ratio, timed
from benchmarks.setting import DECODING, Setting
from transfertransfo.data.inputs import Example, context_length
from transfertransfo.decoding import Context, decode, sample_sequence
from transfertransfo.model.double_heads import DoubleHeads

CONTEXT = 120
ROUNDS = 2  # of each repetition: one reply is short


def chat(setting: Setting) -> Iterator[dict]:
    model, tokenizer = setting.model, setting.tokenizer
    lm = reference.lm_head(reference.double_heads(model))
    example = random_example()
    ours, other = in_turn(
        [
            lambda _: sample_sequence(*example[:2], tokenizer, model, DECODING),
            lambda _: reference.greedy_reply(lm, tokenizer, example, DECODING),
        ],
        range(1 + ROUNDS * setting.sizes.repetitions),
        functools.partial(check_equal, "chat, reply"),
    )
    yield ratio(f"chat, {DECODING.max_length} tokens after {CONTEXT}", ours, other, ">= 8")
    step = seconds_a_token(model, example, tokenizer)
    yield figure("chat: a token", 1000 * step, unit="ms")
    looked_up = model.pretrained.base_model.get_parameter("positions_embed.weight")
    read = sum(p.nbytes for p in model.parameters()) - looked_up.nbytes
    bandwidth = copy_bandwidth(torch.ones(64 * 2**20))
    yield figure("chat: share of a copy's bandwidth", read / step / bandwidth, unit="ratio", gb_per_s=bandwidth / 1e9)


def random_example() -> Example:
    words = torch.randint(100, 1000, (CONTEXT,)).tolist()
    persona, history = [words[:20], words[20:40]], [words[40:60], words[60:80], words[80:115]]
    assert context_length(persona, history) == CONTEXT
    return Example(persona, history, [])


def seconds_a_token(model: DoubleHeads, example: Example, tokenizer: PreTrainedTokenizerBase) -> float:
    """Median over a reply's tokens but the first, before which the context is encoded."""
    times = [time.perf_counter() for _ in decode(model, [Context(*example[:2])], tokenizer, DECODING)]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def copy_bandwidth(source: Tensor) -> float:
    """Bytes a second that a copy reads and writes."""
    target = source.clone()  # both written to once: memory that never was is no memory yet
    times: list[Seconds] = []
    for _ in range(10):
        with timed(times):
            target.copy_(source)
    return 2 * source.nbytes / min(seconds.wall for seconds in times)

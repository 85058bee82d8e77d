"""Whether a kind of model can be used here: packed rows and cached steps give what it gives a sequence alone.

That is tried on a model of the same configuration, whose weights are drawn and take no memory. Those of a checkpoint
could hide what a model does: where they are small its attention is the same everywhere, and no logit comes near a cap.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.initialization import no_init_weights

from transfertransfo.errors import UserError, first_line
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.model.heads import FAMILIES
from transfertransfo.model.sharding import parameters_on_meta, with_drawn_values
from transfertransfo.model.sources import unusable

SPANS = re.compile(r"(window(_size|_len)?|chunk_size|local_attention)$")  # settings that say how far layers look back
SHORT = 3  # tokens, of a span that is to matter in a short row


def check_packing_(model: DoubleHeads, checkpoint: str | Path) -> None:
    """Check that packed rows and cached steps give what a model gives a sequence alone, and find how it takes masks.

    There are models that ignore position ids or masks, that go through a row in order, or that scale their logits.

    Raises:
        UserError: the model is of such a kind.
    """
    error = None
    for window_by in ("layer type", "model", "") if model.window else ("",):
        for additive_mask in (False, True):
            try:
                if computes_the_same(model, additive_mask, window_by):
                    model.additive_mask, model.window_by = additive_mask, window_by
                    return
            except Exception as raised:  # whatever a model's code does with arguments that it does not expect
                error = raised
    reason = f" ({first_line(error)})" if error else ""
    raise unusable(
        checkpoint,
        f"a {model.pretrained.config.model_type} model, whose attention, positions or"
        f" logits are of a kind that is not known here{reason}",
    ) from error


@torch.no_grad()
def computes_the_same(model: DoubleHeads, additive_mask: bool, window_by: str) -> bool:
    """Whether packed rows and cached steps give what a model of this configuration gives a sequence alone.

    Args:
        additive_mask, window_by: the attributes of `DoubleHeads` to be tried.
    """
    device = model.device
    probe = without_weights(model, window_by)
    probe.additive_mask, probe.window_by = additive_mask, window_by
    n = min(300, probe.n_positions - 3)  # long, for spans that SPANS does not know
    ids = torch.tensor([[1, 2, 3] + [4] * n + [5, 6]], device=device)  # a context and two replies
    positions = torch.tensor([[*range(3 + n), 3, 4]], device=device)
    segments = torch.tensor([0] * 3 + [1] * n + [2] * 2, device=device)
    alone = [0, 1, 2, n + 3, n + 4]
    causal = torch.ones(n + 5, n + 5, dtype=torch.bool, device=device).tril()
    mask = causal & ((segments == 0) | (segments == segments[:, None]))
    with with_drawn_values(probe, device), inputs_of_loud(probe.pretrained.get_output_embeddings()) as hidden_alone:
        probe.to(device)
        want = probe.pretrained(input_ids=ids[:, alone], use_cache=False).logits[0, -2:]
        packed = probe.hidden_states(ids, ids, positions, mask[None, None])[0, -2:]
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        for part in (alone[:3], alone[3:4], alone[4:]):
            cached = probe.hidden_states(ids[:, part], ids[:, part], positions[:, part], None, cache)[0, -1:]
        hidden = torch.cat([packed, cached])
        got = probe.lm_logits(hidden)
    if not want.isfinite().all():
        raise ValueError("its logits are not finite")
    # the logits alone would say little where they are capped
    pairs = [(got, want), (hidden, hidden_alone[0][0, -2:])]
    return all((here - there[[0, 1, 1]]).norm() < 1e-3 * there.norm() for here, there in pairs)


def without_weights(model: DoubleHeads, window_by: str) -> DoubleHeads:
    """A model of the same configuration with parameters on meta, whose layers look back over `SHORT` tokens at most.

    Args:
        window_by: "" leaves a sliding window as it is: sequences end with it then.
    """
    config: PretrainedConfig = copy.deepcopy(model.pretrained.config)
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if SPANS.search(name) and type(value) is int and (window_by or name != "sliding_window"):
            setattr(text, name, SHORT)
    with parameters_on_meta(), no_init_weights():  # to draw what is thrown away takes most of the time
        probe = DoubleHeads(type(model.pretrained)(config)).eval()
    probe.token_types = False
    return probe


@contextlib.contextmanager
def inputs_of_loud(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list to which each input of an output layer is added; its logits are 10,000 times as great, beyond any cap."""
    inputs: list[torch.Tensor] = []

    def louder(_: nn.Module, arguments: tuple, logits: torch.Tensor) -> torch.Tensor:
        inputs.append(arguments[0])
        return logits * 1e4

    hook = layer.register_forward_hook(louder)
    try:
        yield inputs
    finally:
        hook.remove()


def use_eager_attention_(model: DoubleHeads) -> None:
    """Make a decoder of transformers attend by plain matrix products, where it computes the same by them.

    On a CPU in bfloat16 they take half the time of torch's fused kernel, forward and backward.
    """
    pretrained = model.pretrained
    if pretrained.config.model_type in FAMILIES:
        return
    before = pretrained.config._attn_implementation
    pretrained.set_attn_implementation("eager")
    try:
        check_packing_(model, "")
    except UserError:
        pretrained.set_attn_implementation(before)

"""Adapters over 4-bit weights: QLoRA (Dettmers et al. 2023), by bitsandbytes.

The frozen weights take an eighth of float32's memory. Each product unpacks its layer for as long as it takes.
"""

import importlib.util
import logging

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from transfertransfo.errors import SettingError, first_line, require
from transfertransfo.model.double_heads import DoubleHeads, base_digest

logger = logging.getLogger(__name__)


class Linear4bit(nn.Module):
    """A frozen linear layer whose weights are nf4, with their scales quantised too: 4.13 bits a weight.

    It computes as `nn.Linear` does of the unpacked weights: in autocast's type, else in that of its input.

    Args:
        layer: its weights, in float32, and its bias, which stays as it is.
        device: where it is quantised, and stays.
        dtype: in which the backward unpacks weights.
    """

    def __init__(self, layer: nn.Linear | Conv1D, device: torch.device | str, dtype: torch.dtype):
        super().__init__()
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import quantize_4bit

        weight = layer.weight.detach().to(device)
        rows = weight.T if isinstance(layer, Conv1D) else weight  # (out, in)
        packed, self.state = quantize_4bit(rows.contiguous(), compress_statistics=True, quant_type="nf4")
        self.state.dtype = dtype
        self.weight = nn.Parameter(packed, requires_grad=False)  # two weights a byte
        self.bias = layer.bias
        self.multiply = matmul_4bit

    def forward(self, inputs: Tensor) -> Tensor:
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.multiply(inputs.to(dtype), self.weight, self.state, bias=bias)

    def unpacked(self) -> Tensor:
        """The weights that it computes with, (out, in)."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self.state)

    def scale_bytes(self) -> int:
        """Bytes of the scales, which stand beside the weights."""
        second = self.state.state2
        tables = (self.state.code, self.state.absmax, self.state.offset, second.code, second.absmax)
        return sum(table.numel() * table.element_size() for table in tables)


def can_quantize() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantize_(model: DoubleHeads, device: torch.device | str, *, bf16: bool = False) -> None:
    """Quantise the linear layers of a model's blocks beside their adapters, and move the model to a device.

    The device never holds the whole weights: a layer is moved there alone. Embeddings, heads, norms, adapters and
    experts that are one tensor stay as they are.

    Args:
        model: on the CPU, with an adapter, in float32.
        bf16: whether it is to compute in bfloat16.

    Raises:
        SettingError: no bitsandbytes, or none that works on the device.
    """
    require("quantize 4bit", "bitsandbytes", setting="quantize")
    model.digest = base_digest(model)  # devices may round a weight differently
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        for parent in [*model.pretrained.get_decoder().modules()]:
            for name, layer in [*parent.named_children()]:
                if type(layer) in (nn.Linear, Conv1D) and not layer.weight.requires_grad:  # an adapter's are trained
                    setattr(parent, name, Linear4bit(layer, device, dtype))
    except Exception as error:  # whatever a library for another device, or for none, raises
        message = f"quantize 4bit: bitsandbytes does not work on {device} ({first_line(error)})"
        raise SettingError(message, "quantize") from error
    model.to(device)


def quantized_layers(model: nn.Module) -> list[Linear4bit]:
    return [layer for layer in model.modules() if isinstance(layer, Linear4bit)]

"""Half precision with apex's meanings of O0 to O3: through apex where it can be imported, through torch elsewhere.

""   O0  float32
bf16     bfloat16 autocast: the range of float32, so gradients need no scale
O1       float16 autocast, a dynamic loss scale
O2       float16 weights but for the norms, float32 master weights in the optimizer, a dynamic loss scale
O3       float16 weights, no scale
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from transfertransfo.errors import SettingError
from transfertransfo.model.double_heads import prepare_bfloat16
from transfertransfo.model.sharding import whole

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 10  # in a row, before a run is given up


def make_precision(
    level: str, model: nn.Module, make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer], device: torch.device
) -> "Precision":
    """Prepare a model, in place, and its optimizer for a level; to be called before the model is distributed.

    Args:
        level: "", "O0" to "O3" or "bf16".
        make_optimizer: makes the optimizer of the parameters that it is to step, of `model` those that are trained.

    Raises:
        SettingError: float16 asked for on a CPU.
    """
    if level in ("O1", "O2", "O3"):
        if device.type == "cpu":
            message = f"fp16 {level}: float16 training needs a GPU; on a CPU use bf16, or leave it out"
            raise SettingError(message, "fp16")
        try:
            from apex import amp
        except ImportError:
            logger.info("Precision %s: by torch itself, apex's amp is not installed", level)
        else:
            logger.info("Precision %s: by apex's amp", level)
            return ApexPrecision(level, model, make_optimizer, amp)
    if level == "bf16":
        prepare_bfloat16(device)
    return NativePrecision(level, model, make_optimizer, device)


class NativePrecision:
    """A level by torch itself.

    Attributes:
        optimizer: steps the parameters, or with O2 their float32 masters.
        bad_steps: (), int64: steps in a row that were skipped for a gradient that is not finite.
        skipped_steps: (), int64: all of them.
    """

    def __init__(self, level: str, model: nn.Module, make_optimizer: Callable, device: torch.device):
        self.model = model
        if level in ("O2", "O3"):
            for module in model.modules():
                own = list(module.parameters(recurse=False))
                is_norm = own and all(parameter.dim() == 1 for parameter in own)
                for parameter in own if level == "O3" or not is_norm else ():
                    parameter.data = parameter.data.half()  # buffers stay: rotary angles need float32
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [nn.Parameter(p.detach().float()) for p in self.parameters] if level == "O2" else self.parameters
        self.optimizer = make_optimizer(self.masters)
        dtype = {"bf16": torch.bfloat16, "O1": torch.float16, "O2": torch.float16}.get(level)
        self._autocast = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
        self._scaler = GradScaler(device.type, enabled=level in ("O1", "O2"))
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_steps = torch.zeros_like(self.bad_steps)

    def autocast(self) -> contextlib.AbstractContextManager:
        return self._autocast

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, max_norm: float) -> None:
        """Clip the gradient, unscaled, to `max_norm`; step, unless it is not finite; forget it."""
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        self._scaler.unscale_(self.optimizer)
        bad = ~whole(clip_grad_norm_(self.masters, max_norm or math.inf)).isfinite()
        self.optimizer.found_inf = bad.float()  # read by torch's fused optimizers: skips without waiting for the device
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()
        self.skipped_steps += bad
        self.bad_steps += 1
        self.bad_steps *= bad
        self._copy_masters()

    @torch.no_grad()
    def _copy_masters(self) -> None:
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters):
                parameter.copy_(master)

    def state_dict(self) -> dict:
        masters = [] if self.masters is self.parameters else [master.detach() for master in self.masters]
        counts = {"bad_steps": self.bad_steps, "skipped_steps": self.skipped_steps}
        return {"scaler": self._scaler.state_dict(), "masters": masters, **counts}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self._scaler.load_state_dict(state["scaler"])
        self.bad_steps.copy_(state["bad_steps"])
        self.skipped_steps.copy_(state["skipped_steps"])
        for master, saved in zip(self.masters, state["masters"]):
            master.copy_(saved)
        self._copy_masters()


class ApexPrecision:
    """A level by apex's amp, as its documentation has it: initialize, scale_loss, master_params."""

    def __init__(self, level: str, model: nn.Module, make_optimizer: Callable, amp: ModuleType):
        self._amp = amp
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _, self.optimizer = amp.initialize(model, make_optimizer(trained), opt_level=level)
        self.bad_steps = self.skipped_steps = torch.zeros((), dtype=torch.int64)  # amp skips by itself, and says so

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # amp patches torch's functions instead

    def backward(self, loss: Tensor) -> None:
        with self._amp.scale_loss(loss, self.optimizer) as scaled_loss:
            scaled_loss.backward()

    def step(self, max_norm: float) -> None:
        clip_grad_norm_(self._amp.master_params(self.optimizer), max_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict:
        return self._amp.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self._amp.load_state_dict(state)


Precision = NativePrecision | ApexPrecision

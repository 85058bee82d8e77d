"""Half precision: what each level does to weights, gradients and steps, and apex's amp called as documented.

float16 is for GPUs; its arithmetic is tested here on a CPU, below the check that keeps training from it.
"""

import contextlib
import os
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn

from transfertransfo.errors import UserError
from transfertransfo.training.precision import NativePrecision, make_precision

CPU = torch.device("cpu")
OPTIMIZER = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0, fused=True)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.linear(x))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def loss_of(model: nn.Module, scale: float = 1.0) -> torch.Tensor:
    """A loss whose gradient is longer than 1."""
    x = torch.linspace(-1, 1, 8).view(2, 4).to(model.linear.weight.dtype)
    return (model(x).float() * torch.arange(8).view(2, 4)).sum() * scale


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_float16_on_a_cpu_is_refused(level):
    with pytest.raises(UserError, match=f"^fp16 {level}: float16 training needs a GPU"):
        make_precision(level, Tiny(), OPTIMIZER, CPU)


@pytest.mark.parametrize("level", ["", "O0", "bf16"])
def test_what_runs_on_a_cpu(level):
    model = Tiny()
    precision = make_precision(level, model, OPTIMIZER, CPU)
    with precision.autocast():
        assert model.linear(torch.ones(1, 4)).dtype == (torch.bfloat16 if level == "bf16" else torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_levels_of_float16():
    dtypes = {}
    for level in ("O1", "O2", "O3"):
        model = Tiny()
        precision = NativePrecision(level, model, OPTIMIZER, CPU)
        dtypes[level] = [model.linear.weight.dtype, model.norm.weight.dtype, precision.masters[0].dtype]
    half, single = torch.float16, torch.float32
    assert dtypes == {"O1": [single] * 3, "O2": [half, single, single], "O3": [half] * 3}


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_clipping_sees_unscaled_gradients(level):
    """A scaled gradient, 65,536 times as long, clipped to the same norm would give another step."""
    models = {name: Tiny() for name in ("", level)}
    for name, model in models.items():
        precision = NativePrecision(name, model, partial(torch.optim.SGD, lr=1.0, fused=True), CPU)
        with torch.autocast("cpu", enabled=False):
            precision.backward(loss_of(model, 0.01))
        precision.step(max_norm=0.02)
    for plain, half in zip(*map(weights, models.values())):
        torch.testing.assert_close(half.float(), plain, atol=1e-3, rtol=1e-3)
    assert any((plain - start).abs().max() > 5e-3 for plain, start in zip(weights(models[""]), weights(Tiny())))


@pytest.mark.parametrize("level", ["", "bf16", "O1", "O2", "O3"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_step_without_finite_gradient_is_skipped_and_counted(level, bad):
    model = Tiny()
    precision = NativePrecision(level, model, OPTIMIZER, CPU)
    before = weights(model)
    for _ in range(3):
        precision.backward(loss_of(model, bad))
        precision.step(max_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))
    assert (precision.bad_steps, precision.skipped_steps) == (3, 3)
    precision.backward(loss_of(model, 1e-3))
    precision.step(max_norm=1.0)
    assert (precision.bad_steps, precision.skipped_steps) == (0, 3)
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(model)))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_state_goes_through_a_checkpoint():
    first, second = Tiny(), Tiny()
    saved = NativePrecision("O2", first, OPTIMIZER, CPU)
    saved.backward(loss_of(first, float("inf")))  # lowers the scale
    saved.step(1.0)
    saved.backward(loss_of(first, 1e-3))
    saved.step(1.0)
    loaded = NativePrecision("O2", second, OPTIMIZER, CPU)
    loaded.load_state_dict(saved.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(saved.masters, loaded.masters))
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second)))
    assert loaded.state_dict()["scaler"] == saved.state_dict()["scaler"]
    assert loaded.skipped_steps == 1


def test_apex_is_called_as_documented(monkeypatch):
    """https://nvidia.github.io/apex/amp.html: initialize, then scale_loss around backward, clip the master_params."""
    calls = []
    amp = types.ModuleType("apex.amp")

    def initialize(model, optimizer, opt_level):
        calls.append(("initialize", opt_level))
        return model, optimizer

    @contextlib.contextmanager
    def scale_loss(loss, optimizer):
        calls.append("scale_loss")
        yield loss
        calls.append("unscaled")

    def master_params(optimizer):
        calls.append("master_params")
        return (parameter for group in optimizer.param_groups for parameter in group["params"])

    amp.initialize, amp.scale_loss, amp.master_params = initialize, scale_loss, master_params
    amp.state_dict, amp.load_state_dict = lambda: {"scale": 2}, lambda state: calls.append(("load", state))
    apex = types.ModuleType("apex")
    apex.amp = amp
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.amp", amp)

    model = Tiny()
    before = weights(model)
    precision = make_precision("O1", model, OPTIMIZER, torch.device("cuda"))  # apex is never asked to go to a GPU
    precision.backward(loss_of(model))
    precision.step(1.0)
    precision.load_state_dict(precision.state_dict())
    assert calls == [("initialize", "O1"), "scale_loss", "unscaled", "master_params", ("load", {"scale": 2})]
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(model)))


@pytest.mark.parametrize(("level", "user", "expected"), [("bf16", None, "64"), ("bf16", "9", "9"), ("", None, None)])
def test_bfloat16_on_a_cpu_keeps_few_kernels(monkeypatch, level, user, expected):
    """Rows of all lengths filled torch's and oneDNN's caches: a small model took 9 GB after two thousand steps."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.setenv(name, user or "")  # so that it is as before in the end
        if user is None:
            monkeypatch.delenv(name)
    make_precision(level, torch.nn.Linear(2, 2), torch.optim.SGD, torch.device("cpu"))
    assert [os.environ.get(name) for name in names] == [expected] * 2

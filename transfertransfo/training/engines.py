"""The two engines of a training run: what happens to one batch in training and in validation."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import ignite.distributed as idist
import torch
from ignite.engine import Engine, EventEnum, Events
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from transfertransfo.data.trees import IGNORED, Batch
from transfertransfo.errors import UserError
from transfertransfo.model.lora import HEAD
from transfertransfo.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Settings by which the losses of a run's batches change its model.

    Attributes:
        lr: first learning rate; it falls linearly to 0 over the run.
        head_lr: the same for the choice head (None = `lr`).
        warmup_steps: optimizer steps over which the rates rise from 0 (0 = off).
        gradient_accumulation_steps: iterations, a forward and backward each, of one optimizer step.
        lm_coef: weight of the language-model loss.
        mc_coef: weight of the choice loss.
        label_smoothing: probability of a word that is spread over the vocabulary (0 = off).
        max_norm: norm to which longer gradients are clipped (0 = off).
    """

    lr: float
    head_lr: float | None
    warmup_steps: int
    gradient_accumulation_steps: int
    lm_coef: float
    mc_coef: float
    label_smoothing: float
    max_norm: float


class Diverged(UserError):
    """The numbers of a run are finite no more: there is no use in going on."""


class StepEvents(EventEnum):
    """Fired by the trainer when the parameters have changed: once in `gradient_accumulation_steps` iterations."""

    OPTIMIZER_STEP = "optimizer_step"


def create_trainer(
    model: torch.nn.Module,
    precision: Precision,
    optimisation: Optimisation,
    device: torch.device,
    count_ahead: Callable[[range], list[int]] | None = None,
) -> Engine:
    """An engine whose iteration is one forward and backward, and every so many of them an optimizer step.

    Args:
        count_ahead: gives the labels of each head in iterations to come, of all processes. A step's loss is then the
            mean over all of its labels; None = the mean of its iterations' means, as in the original.

    It fires `StepEvents.OPTIMIZER_STEP`, with the step's own losses in `state.losses`, a tensor of the weighted sum,
    the language-model and the choice loss, of this process.
    """
    accumulated: list[torch.Tensor] = []  # losses since the last optimizer step
    coefficients = torch.tensor([optimisation.lm_coef, optimisation.mc_coef], device=device)
    micro_steps = optimisation.gradient_accumulation_steps
    iterations = range(0)  # of this optimizer step
    counts: torch.Tensor | None = None  # (2,), labels of one of them, on average

    def step(engine: Engine, batch: Batch) -> None:
        nonlocal iterations, counts
        state = engine.state
        n_iterations = state.max_epochs * state.epoch_length
        share = 1 - (state.iteration - 1) / n_iterations
        if optimisation.warmup_steps:
            share *= min(1, (state.optimizer_step + 1) / optimisation.warmup_steps)
        for group in precision.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        if not accumulated:
            # original: what is left over at the end of the run is thrown away
            last = min(-(-state.iteration // micro_steps) * micro_steps, n_iterations)
            iterations = range(state.iteration, last + 1)
            counts = torch.tensor(count_ahead(iterations), device=device) / len(iterations) if count_ahead else None
        full = state.iteration == iterations[-1]
        with contextlib.ExitStack() as stack:
            if isinstance(model, DistributedDataParallel) and not full:
                stack.enter_context(model.no_sync())  # processes exchange their gradients once an optimizer step
            elif isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(full)
            with precision.autocast():
                losses = distributed_losses(model, batch.to(device), optimisation.label_smoothing, counts)
            loss = losses @ coefficients
            precision.backward(loss / len(iterations))
        accumulated.append(torch.cat([loss[None], losses]).detach())
        if not full:
            return
        state.optimizer_step += 1
        set_adam_eps_(precision.optimizer, state.optimizer_step)
        precision.step(optimisation.max_norm)
        state.losses = torch.stack(accumulated).mean(0)
        accumulated.clear()
        engine.fire_event(StepEvents.OPTIMIZER_STEP)

    trainer = Engine(step)
    trainer.register_events(*StepEvents, event_to_attr={StepEvents.OPTIMIZER_STEP: "optimizer_step"})
    trainer.state_dict_user_keys.append("optimizer_step")
    return trainer


def distributed_losses(
    model: torch.nn.Module, batch: Batch, label_smoothing: float = 0.0, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """(2,): language-model and choice loss, whose mean over processes is the loss of all their rows in one batch.

    Each is a sum divided by what all processes count, not a mean of means: k processes are one with a k-fold batch.
    Label smoothing (Szegedy et al. 2016, section 7) is of the language model's.

    Args:
        counts: (2,), what the sums are divided by instead.
    """
    reduction = None
    if counts is None:
        counts = count_labels(batch)
        # meanwhile each process goes on with its own forward: none waits for the slowest at every batch
        reduction = torch.distributed.all_reduce(counts, async_op=True) if idist.get_world_size() > 1 else None
    lm_logits, choice_scores = model(batch)
    sums = torch.stack([
        cross_entropy(lm_logits.float(), batch.lm_labels, reduction="sum", label_smoothing=label_smoothing),
        cross_entropy(choice_scores.float(), batch.choice_labels, reduction="sum"),
    ])  # fmt: skip
    if reduction:
        reduction.wait()
    return sums * idist.get_world_size() / counts


def count_labels(batch: Batch) -> torch.Tensor:
    """(2,), int64: number of the labels of each head, made on the device: a copy to it would wait for it."""
    return torch.stack([(labels != IGNORED).sum() for labels in (batch.lm_labels, batch.choice_labels)])


def set_adam_eps_(optimizer: AdamW, step: int, eps: float = 1e-6) -> None:
    """Make torch's AdamW at step `step`, from 1 on, that of transformers 2: eps added before the bias correction."""
    for group in optimizer.param_groups:
        group["eps"] = eps / math.sqrt(1 - group["betas"][1] ** step)


def create_evaluator(model: torch.nn.Module, precision: Precision, device: torch.device) -> Engine:
    """An engine that leaves `nll` (nats a token), `ppl` and `accuracy` (hits@1) of all examples in `state.metrics`."""
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # nll, tokens, hits, examples

    @torch.no_grad()  # not inference_mode: what a model in shards gathers here, the training goes on with
    def step(engine: Engine, batch: Batch) -> None:
        batch = batch.to(device)
        with precision.autocast():
            lm_logits, choice_scores = model(batch)
        nll = cross_entropy(lm_logits.float(), batch.lm_labels, reduction="sum")
        hits = batch.right.gather(1, choice_scores.argmax(-1, keepdim=True)).sum()
        tokens, examples = count_labels(batch)
        sums.add_(torch.stack([nll, tokens, hits, examples]))

    evaluator = Engine(step)

    @evaluator.on(Events.STARTED)
    def begin() -> None:
        model.eval()
        sums.zero_()

    @evaluator.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        nll, tokens, hits, examples = idist.all_reduce(sums.clone()).tolist()
        nll /= max(tokens, 1)
        if not math.isfinite(nll):
            raise Diverged(f"validation: the model's loss is {nll}, not a number to go by; nothing is exported")
        ppl = math.exp(min(nll, 700))  # JSON, in which it is written, has no infinity
        engine.state.metrics = {"nll": nll, "ppl": ppl, "accuracy": hits / examples}
        model.train()

    return evaluator


def make_adamw(
    parameters: Iterable[torch.nn.Parameter], names: Sequence[str], *, lr: float, head_lr: float | None = None
) -> AdamW:
    """AdamW over parameters of these names, each group with its first learning rate as `initial_lr`.

    The choice head's parameters are a group of their own where it has its own rate.
    """
    body: list[torch.nn.Parameter] = []
    head: list[torch.nn.Parameter] = []
    for name, parameter in zip(names, parameters, strict=True):
        has_own_rate = head_lr is not None and HEAD in name
        (head if has_own_rate else body).append(parameter)
    rated = [(group, rate) for group, rate in ((body, lr), (head, head_lr)) if group]
    groups = [{"params": group, "lr": rate, "initial_lr": rate} for group, rate in rated]
    optimizer = AdamW(groups, weight_decay=0.0, fused=True)
    optimizer.register_load_state_dict_pre_hook(_add_first_rates)
    return optimizer


def _add_first_rates(optimizer: Optimizer, state: dict) -> None:
    """Give the groups of a checkpoint that was written before they held `initial_lr` those of the optimizer."""
    for saved, group in zip(state["param_groups"], optimizer.param_groups):
        saved.setdefault("initial_lr", group["initial_lr"])

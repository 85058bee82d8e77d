"""How long a run is going to be, and what came of it, in lines that whoever trains can judge by."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from transfertransfo.training.runs import METRICS

logger = logging.getLogger(__name__)

FEW_STEPS = 100  # optimizer steps; a new character takes about as many


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of a run.

    Attributes:
        n_batches: iterations of an epoch.
        micro_steps: iterations of one optimizer step.
        batch_size: examples of an iteration, of all processes together.
        lr: the first learning rate.
    """

    n_examples: int
    n_batches: int
    n_epochs: int
    micro_steps: int
    batch_size: int
    lr: float

    @property
    def n_steps(self) -> int:
        """Optimizer steps; what is left over at the end of the run makes one too."""
        return math.ceil(self.n_epochs * self.n_batches / self.micro_steps)

    @property
    def epochs_for_enough(self) -> int:
        """Epochs that make `FEW_STEPS` steps where each batch makes one."""
        return math.ceil(FEW_STEPS / self.n_batches)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Losses and validations of a run, from its `metrics.jsonl`.

    Attributes:
        losses: of the logged steps.
        nll, hits: of the validation after each epoch, by the epoch's number.
        before: `nll` of the validation before the first step (None = there was none).
    """

    losses: list[float]
    nll: dict[int, float]
    hits: dict[int, float]
    before: float | None

    @classmethod
    def of(cls, folder: Path) -> "Outcome":
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        validations = {line["epoch"]: line for line in lines if "split" in line}
        first = validations.pop(0, None)
        return cls(
            losses=[line["loss"] for line in lines if "split" not in line],
            nll={epoch: line["nll"] for epoch, line in validations.items()},
            hits={epoch: line["accuracy"] for epoch, line in validations.items()},
            before=first and first["nll"],
        )

    @property
    def learnt(self) -> bool:
        """Whether a loss fell by a hundredth at least.

        It is that of validation, where there was one before the first step. Else it is the logged steps' mean: of their
        last quarter beside their first.
        """
        if self.before is not None and self.nll:
            return min(self.nll.values()) < 0.99 * self.before
        quarter = max(1, len(self.losses) // 4)
        return sum(self.losses[-quarter:]) < 0.99 * sum(self.losses[:quarter])

    @property
    def lowest_nll(self) -> int:
        """The first epoch with the lowest `nll`; there must have been a validation."""
        return min(self.nll, key=self.nll.__getitem__)

    @property
    def most_hits(self) -> int:
        """The first epoch with the highest hits@1."""
        return max(self.hits, key=self.hits.__getitem__)


def log_plan(plan: Plan) -> None:
    """Say how much a run is going to learn from, and where that is little, which flags make it more."""
    logger.info(
        "Training: %d optimizer steps, %d epochs of %d examples, %d examples a step",
        plan.n_steps, plan.n_epochs, plan.n_examples, plan.batch_size * plan.micro_steps,
    )  # fmt: skip
    if plan.n_steps >= FEW_STEPS:
        return
    accumulated = "--gradient_accumulation_steps 1 " if plan.micro_steps > 1 else ""
    epochs = max(plan.epochs_for_enough, plan.n_epochs)
    logger.warning(
        "%d optimizer steps are few: the model may learn little. %s--n_epochs %d makes %d; a greater --lr learns more"
        " in a step (here %g)",
        plan.n_steps, accumulated, epochs, epochs * plan.n_batches, plan.lr,
    )  # fmt: skip


def log_outcome(outcome: Outcome, export: str, best_metric: str, *, exported: int, seconds: float) -> None:
    """Say what a run came to, and warn where its last epoch is not its best, or where it learnt nothing.

    Args:
        export: which epoch was to be exported, "last" or "best".
        best_metric: what makes an epoch the best, "nll" or "hits@1".
        exported: the epoch that was. It is neither where a run goes on with another `export` (0 = not known).
    """
    minutes = f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if outcome.losses:
        logger.info("Trained in %s: loss %.2f at first, %.2f at last", minutes, outcome.losses[0], outcome.losses[-1])
    if outcome.nll:
        lowest, most, last = outcome.lowest_nll, outcome.most_hits, max(outcome.nll)
        best = lowest if best_metric == "nll" else most
        told = ""
        if exported in outcome.nll:
            name = {best: "the best", last: "the last"}.get(exported, "neither the best nor the last")
            told = f"; exported: epoch {exported}, {name}"
            told += f", nll {outcome.nll[exported]:.4f}, hits@1 {outcome.hits[exported]:.4f}"
        logger.info(
            "Best nll %.4f at epoch %d, best hits@1 %.4f at epoch %d%s",
            outcome.nll[lowest], lowest, outcome.hits[most], most, told,
        )  # fmt: skip
        if export == "last" and outcome.nll[last] > outcome.nll[lowest]:
            logger.warning(
                "The last epoch is worse than the best: best nll %.2f at epoch %d; exported: the last, %.2f;"
                " --export best --best_metric nll exports the best",
                outcome.nll[lowest], lowest, outcome.nll[last],
            )  # fmt: skip
    if outcome.losses and not outcome.learnt:
        logger.warning(
            "The model has learnt nothing: its loss did not fall. More steps (--n_epochs, --gradient_accumulation_steps"
            " 1) or a greater --lr may help; do not expect it to be in character"
        )

"""What a run is about to do and what came of it, in figures that whoever trains can judge by."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from transfertransfo.training.runs import METRICS

FEW_STEPS = 100  # optimizer steps; a new character takes about as many


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of a run.

    Attributes:
        n_batches: iterations of an epoch.
        micro_steps: iterations of one optimizer step.
    """

    n_examples: int
    n_batches: int
    n_epochs: int
    micro_steps: int

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
    """What the lines of a run's `metrics.jsonl` say.

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

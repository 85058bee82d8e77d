"""A training step: forward, backward, clipping and AdamW, of trees, and of a sequence a candidate."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.optim import AdamW

from benchmarks import reference
from benchmarks.measure import check_close, check_equal, figure, in_turn, ratio
from benchmarks.setting import Setting, spread, training_args
from train import make_optimisation
from transfertransfo.data.inputs import BucketSampler, Example, make_fork, make_trees
from transfertransfo.data.trees import Batch, pack
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.training.engines import create_trainer, distributed_losses, make_adamw
from transfertransfo.training.precision import make_precision

BATCH = 4  # dialog turns; the default of --train_batch_size


class PackedTraining:
    """This project's own trainer.

    Attributes:
        multiple: of which the length of a tree is one, in tokens.
        by_dialog: whether examples that follow one another in a dialog share a tree.
    """

    multiple = 1
    by_dialog = False

    def __init__(self, setting: Setting, level: str = "", model: DoubleHeads | None = None):
        self.model, self.tokenizer = model or setting.model, setting.tokenizer
        self.device = torch.device(setting.device)
        optimisation = make_optimisation(training_args())
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        make_optimizer = partial(make_adamw, names=names, lr=optimisation.lr)
        precision = make_precision(level, self.model, make_optimizer, self.device)
        self.trainer = create_trainer(self.model, precision, optimisation, self.device)

    def step(self, examples: list[Example]) -> None:
        self.trainer.run([self.batch(examples)])

    def losses(self, examples: list[Example]) -> torch.Tensor:
        return distributed_losses(self.model, self.batch(examples).to(self.device))

    def batch(self, examples: list[Example]) -> Batch:
        trees = make_trees(examples) if self.by_dialog else [[example] for example in examples]
        forks = [make_fork(example, self.tokenizer) for example in examples]
        return pack(forks, self.tokenizer.pad_token_id, self.multiple, [len(tree) for tree in trees])


class PaddedTraining:
    """The plain recipe, on the same parameters.

    Args:
        length: tokens that each sequence is padded to (0 = the batch's longest).
    """

    def __init__(self, setting: Setting, length: int):
        self.model, self.tokenizer = reference.double_heads(setting.model), setting.tokenizer
        self.device, self.length, self.args = setting.device, length, training_args()
        self.optimizer = AdamW(self.model.parameters(), lr=self.args.lr, weight_decay=0.0)

    def step(self, examples: list[Example]) -> None:
        reference.training_step(self.model, self._tensors(examples), self.optimizer, self.args)

    def losses(self, examples: list[Example]) -> torch.Tensor:
        return torch.stack(reference.losses(self.model, self._tensors(examples)))

    def _tensors(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        return reference.to_tensors(examples, self.tokenizer, self.length, self.device)


def make_batches(examples: list[Example], size: int, count: int) -> list[list[Example]]:
    """Batches as the trainer makes them, short and long ones."""
    sampler = BucketSampler([example.row_length for example in examples], size, shuffle=True)
    batches = [batch for batch in sampler if len(batch) == size]
    batches.sort(key=lambda batch: sampler.lengths[batch].sum())
    return [[examples[i] for i in batch] for batch in spread(batches, count)]


def check_training(packed: PackedTraining, padded: PaddedTraining, examples: list[Example], tolerance: float) -> None:
    """Compare both losses, and the norm of each parameter's gradient, without dropout."""
    norms = []
    for side in (packed, padded):
        side.model.eval()
        side.model.zero_grad()
        losses = side.losses(examples)
        losses.sum().backward()
        parameters = getattr(side.model, "pretrained", side.model).named_parameters()
        norms.append({name: p.grad.norm().item() for name, p in parameters if p.grad is not None})
        norms[-1] |= {"lm loss": losses[0].item(), "choice loss": losses[1].item()}
        side.model.zero_grad()
        side.model.train()
    check_equal("training, parameters", norms[0].keys(), norms[1].keys())
    for name, value in norms[0].items():
        check_close(f"training, {name}", value, norms[1][name], tolerance)


def training(setting: Setting) -> Iterator[dict]:
    """Dropout as the model has it, 0.1, while it is timed; the two sides draw different masks."""
    sizes = setting.sizes
    packed = PackedTraining(setting)
    longest, dynamic = PaddedTraining(setting, sizes.longest), PaddedTraining(setting, 0)
    warm_up, *batches = make_batches(setting.examples(), BATCH, 1 + sizes.repetitions)
    check_training(packed, dynamic, warm_up[:2], 1e-5)
    times = in_turn([packed.step, dynamic.step, longest.step], [warm_up[:1], *batches])
    yield ratio(f"training step, reference padded to {sizes.longest}", times[0], times[2], ">= 10")
    yield ratio("training step, padded to the batch's longest", times[0], times[1], ">= 3")
    setting.model.eval()


def candidates(setting: Setting) -> Iterator[dict]:
    """The same dialog turns with 20 candidates and with 2; the plain recipe costs ten times as much, of course."""
    packed = PackedTraining(setting)
    warm_up, *batches = make_batches(setting.examples(20), BATCH, 1 + setting.sizes.repetitions)
    setting.model.train()
    first_two = lambda batch: packed.step([e._replace(candidates=e.candidates[-2:]) for e in batch])  # noqa: E731
    two, twenty = in_turn([first_two, packed.step], [warm_up[:1], *batches])
    setting.model.eval()
    row = ratio("", two, twenty)
    yield figure("cost of 20 candidates over 2, training step", row["ratio"], "<= 3.5", "ratio",
                 two_s=row["ours_s"], twenty_s=row["reference_s"], repetitions=row["repetitions"])  # fmt: skip

"""Whole dialogs as trees, beside the plain recipe of one sequence a dialog, and beside trees of single turns."""

from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

import torch
from torch.optim import AdamW

from benchmarks import reference
from benchmarks.bench_training import PackedTraining
from benchmarks.measure import check_close, check_equal, figure, in_child, in_turn, ratio
from benchmarks.setting import DECODING, Setting, Sizes, spread, training_args
from transfertransfo.data.inputs import Example, make_examples
from transfertransfo.evaluation.evaluator import Evaluator, Turn
from transfertransfo.evaluation.metrics import count_words

DIALOGS = 2  # of a batch
Dialog = list[Example]


class DialogTraining(PackedTraining):
    """This project's trainer on batches of whole dialogs, or of their turns."""

    def __init__(self, setting: Setting, by_dialog: bool = True):
        super().__init__(setting)
        self.by_dialog = by_dialog


class PlainTraining:
    """The plain recipe: a conversation is a sequence, all own replies are labelled, the language model's loss alone."""

    def __init__(self, setting: Setting):
        self.model, self.tokenizer = reference.lm_head(reference.double_heads(setting.model)), setting.tokenizer
        self.device, self.args = setting.device, training_args()
        self.optimizer = AdamW(self.model.parameters(), lr=self.args.lr, weight_decay=0.0)

    def step(self, dialogs: list[Example]) -> None:
        batch = reference.conversation_tensors(dialogs, self.tokenizer, self.device)
        reference.language_model_step(self.model, batch, self.optimizer, self.args)

    def losses(self, dialogs: list[Example]) -> torch.Tensor:
        return self.model(**reference.conversation_tensors(dialogs, self.tokenizer, self.device)).loss


def make_dialogs(setting: Setting, num_candidates: int, max_history: int) -> list[Dialog]:
    """The training examples of each dialog."""
    dialogs = setting.dataset.dialogs("train", setting.dataset.tokens)
    positions = setting.sizes.shape.n_positions
    return [make_examples([dialog], max_history, positions, num_candidates) for dialog in dialogs]


def choose(dialogs: list[Dialog], repetitions: int) -> list[list[int]]:
    """Batches of dialogs, a warm-up first: short and long ones."""
    order = sorted(range(len(dialogs)), key=lambda i: sum(example.row_length for example in dialogs[i]))
    batches = [order[start : start + DIALOGS] for start in range(0, len(order) - DIALOGS + 1, DIALOGS)]
    return [batches[0], *spread(batches, repetitions)]


def training_side(side: DialogTraining, dialogs: list[Dialog]) -> Callable[[list[int]], None]:
    return lambda batch: side.step(list(chain.from_iterable(dialogs[i] for i in batch)))


def gold_tokens(dialogs: list[Dialog], batches: list[list[int]]) -> int:
    return sum(len(example.candidates[-1]) for batch in batches for i in batch for example in dialogs[i])


def check_words(setting: Setting, plain: PlainTraining, dialog: Dialog) -> None:
    """The words of all replies have the same loss in a conversation and in a tree, where `<eos>` is learnt as well."""
    with torch.no_grad():
        batch = DialogTraining(setting).batch(dialog)
        logits, _ = setting.model.eval()(batch)
        nll = torch.nn.functional.cross_entropy(logits, batch.lm_labels, reduction="none")
        words = (batch.lm_labels != setting.tokenizer.eos_token_id) | (
            torch.arange(len(nll)) == len(nll) - 1  # the last one is learnt by both
        )
        plain.model.eval()
        check_close("dialogs, loss of the words", nll[words].mean().item(), plain.losses([dialog[-1]]).item(), 1e-4)
    plain.model.train()
    setting.model.train()


def dialogs(setting: Setting) -> Iterator[dict]:
    """The same dialogs by the plain recipe, as trees, and as single turns. All of them learn the same gold replies."""
    whole = make_dialogs(setting, 1, -1)
    batches = choose(whole, setting.sizes.repetitions)
    plain, trees, turns = PlainTraining(setting), DialogTraining(setting), DialogTraining(setting, by_dialog=False)
    check_words(setting, plain, whole[batches[0][0]])
    tokens = gold_tokens(whole, batches[1:])
    plain_side = lambda batch: plain.step([whole[i][-1] for i in batch])  # noqa: E731
    for candidates, max_history, goal, goal_of_turns in (
        (1, -1, ">= 1", ""), (2, -1, ">= 0.7", ""), (6, -1, "", ""),
        (1, 2, "", ">= 1.5"), (2, 2, "", ""), (6, 2, "", ">= 1.25"),
    ):  # fmt: skip
        examples = make_dialogs(setting, candidates, max_history)
        theirs, ours, single = in_turn(
            [plain_side, training_side(trees, examples), training_side(turns, examples)], batches
        )
        name = f"{candidates} candidate{'s' * (candidates > 1)}, {'whole history' if max_history < 0 else 'window'}"
        rate = tokens / sum(seconds.wall for seconds in ours)
        yield ratio(f"dialogs, {name}, over plain", ours, theirs, goal, gold_tokens_per_s=rate)
        yield ratio(f"dialogs, {name}, over turns", ours, single, goal_of_turns)
    setting.model.eval()


def dialog_evaluation(setting: Setting) -> Iterator[dict]:
    """hits@1 and word ppl of the same turns, those of a dialog after one another, or those of several in turn."""
    dataset = setting.dataset
    counts = count_words(dataset.all_dialogs(dataset.texts))
    for measured, goal in (("hits@1", ">= 1.1"), ("ppl", ">= 1.5")):
        evaluator = Evaluator(setting.model, setting.tokenizer, measured, DECODING, counts=lambda: counts)
        groups = list(conversations(setting.turns))
        batches = [groups[start : start + DIALOGS] for start in range(0, len(groups) - DIALOGS + 1, DIALOGS)]
        batches = spread(batches, setting.sizes.repetitions)

        def ours(batch: list[list[Turn]], evaluator: Evaluator = evaluator) -> list:
            return [evaluator(turns) for turns in batch]

        def theirs(batch: list[list[Turn]], evaluator: Evaluator = evaluator) -> list:
            mixed = [turn for turns in zip_longest(*batch) for turn in turns if turn]
            found = {id(turn): result for turn, result in zip(mixed, evaluator(mixed))}
            return [[found[id(turn)] for turn in turns] for turns in batch]

        own, other = in_turn([ours, theirs], [batches[0], *batches], same_results)
        yield ratio(f"{measured}, dialogs over turns", own, other, goal)


def same_results(ours: list, theirs: list) -> None:
    for result, other in zip(chain(*ours), chain(*theirs), strict=True):
        check_equal("ranking", result.get("ranking"), other.get("ranking"))
        for (word, p), (_, q) in zip(result.get("words", ()), other.get("words", ()), strict=True):
            check_equal(f"{word} known", p is None, q is None)
            if p is not None:
                check_close(word, p / q, 1.0, 1e-4)


def conversations(turns: list[Turn]) -> Iterator[list[Turn]]:
    """The turns of each dialog: another begins where the history is no longer than the one before."""
    found: list[Turn] = []
    for turn in turns:
        if found and turn.example.persona is not found[-1].example.persona:
            yield found
            found = []
        found.append(turn)
    yield found


def dialog_memory(setting: Setting) -> Iterator[dict]:
    """Peak memory of a step at 6 candidates, the model and what it imports included, each in a process of its own."""
    peaks = [
        in_child(train_once, setting.path, setting.tokenizer_path, str(setting.folder), setting.sizes, by_dialog)[1]
        for by_dialog in (True, False)
    ]
    yield figure("dialogs, 6 candidates: peak memory over turns", peaks[0] / peaks[1], "<= 1.3", "ratio",
                 dialogs_mb=peaks[0], turns_mb=peaks[1])  # fmt: skip


def train_once(path: str, tokenizer_path: str, folder: str, sizes: Sizes, by_dialog: bool) -> Callable[[], None]:
    own = Path(folder, f"memory-{by_dialog}")
    own.mkdir()
    setting = Setting(path, tokenizer_path, own, sizes)
    examples = make_dialogs(setting, 6, 2)
    setting.model.train()
    step = training_side(DialogTraining(setting, by_dialog), examples)
    for batch in choose(examples, sizes.repetitions):
        step(batch)
    return lambda: None

"""A fine-tuned model as an agent of ParlAI: of 1.7.2, and of 0.1.20200610, the last release with ConvAI2's own scripts.

python -m parlai eval_model --task convai2 -m convai_evaluation:TransformerAgent --model_checkpoint FOLDER
python -m parlai interactive -m convai_evaluation:TransformerAgent --model_checkpoint FOLDER
"""

import math
from argparse import Namespace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from transfertransfo.cli import ArgumentParser, add_evaluation_flags, set_seed
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.inputs import Example, window
from transfertransfo.data.parlai import PERSONA, SILENCE
from transfertransfo.data.sources import dataset_files
from transfertransfo.data.tokenization import check_unknown, tokenize
from transfertransfo.decoding import Decoding
from transfertransfo.errors import SettingError, flags_named
from transfertransfo.evaluation.evaluator import Evaluator, Turn, read_dictionary
from transfertransfo.evaluation.metrics import count_words, nll, perplexity
from transfertransfo.model.loading import load_finetuned

try:
    from parlai.core.agents import Agent
    from parlai.core.metrics import AverageMetric
except ImportError:  # without ParlAI the class is there all the same, for whoever imports it by name
    Agent = AverageMetric = object


ENOUGH = 1000  # tokens of a task that tell whether the model's tokenizer can write its text


class Dialog(NamedTuple):
    """A dialog in which a reply is due, as text."""

    persona: list[str]
    history: list[str]  # all that was said
    candidates: list[str]
    label: str | None  # the gold reply, where the message told it


class Perplexity(AverageMetric):
    """A sum of -ln p over a number of words, shown as their perplexity."""

    def value(self) -> float:
        return perplexity(super().value(), 1)


class FirstTexts:
    """The first texts of a task, looked at once there are enough of them: a task is not at hand as a whole."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] | None = {}  # of each text; None = looked at

    def add(self, tokenizer: PreTrainedTokenizerBase, tokens: dict[str, list[int]]) -> None:
        """Take more texts in.

        Raises:
            UserError: as `check_unknown`.
        """
        if self.tokens is None:
            return
        self.tokens |= tokens
        if sum(len(ids) or 1 for ids in self.tokens.values()) >= ENOUGH:
            first, self.tokens = self.tokens, None
            check_unknown(tokenizer, list(first), list(first.values()), "the task's text")


class TransformerAgent(Agent):
    """Ranks candidates, replies, and gives probabilities of words, by the functions of the evaluation without ParlAI.

    Flags of the agent are those of `cli.add_evaluation_flags`. `opt["record"]`, if there, is called with each
    `Dialog` and the results on it.
    """

    @classmethod
    def add_cmdline_args(cls, parser: Any, partial_opt: dict | None = None) -> Any:
        """Add the agent's flags to ParlAI's parser."""
        group = parser.add_argument_group("TransferTransfo")

        def add_argument(*names: str, **options: Any) -> None:
            # `--model`, elsewhere a second name of --model_checkpoint, is ParlAI's flag for the agent's class
            group.add_argument(*(name for name in names if name != "--model"), **options)

        flags: Any = SimpleNamespace(add_argument=add_argument)
        add_evaluation_flags(flags)
        return parser

    def __init__(self, opt: dict, shared: dict | None = None):
        self.id = type(self).__name__
        self.opt = opt
        if shared:
            self.evaluator, self.max_history = shared["evaluator"], shared["max_history"]
            self.first_texts = shared["first_texts"]
        else:
            args = all_flags(opt)
            self.evaluator, self.max_history = load_evaluator(args), args.max_history
            self.first_texts = FirstTexts()
        self.reset()

    def share(self) -> dict:
        """The state that a copy of the agent shares with it."""
        own = {"evaluator": self.evaluator, "max_history": self.max_history, "first_texts": self.first_texts}
        return {"class": type(self), "opt": self.opt, **own}

    def reset(self) -> None:
        """Forget the dialog."""
        self.persona: list[str] = []
        self.history: list[str] = []
        self.answer: str | None = None  # to the last message: it joins the history with the next one
        self.episode_done = False
        self.observation: dict = {}

    def observe(self, observation: dict) -> dict:
        """Add a message to the dialog; returns the message with the dialog as its "dialog".

        In a batch ParlAI has one copy of the agent listen in each dialog, and another one, which heard none, reply.
        """
        if self.episode_done:
            self.reset()
        if self.answer is not None:
            self.history.append(self.answer)
        for line in (observation.get("text") or "").split("\n"):
            line = line.strip()
            if match := PERSONA.fullmatch(line):
                self.persona += [match[2].strip()] if match[1].lower() == "your" else []
            elif line and line != SILENCE:
                self.history.append(line)
        (self.answer, *_) = observation.get("eval_labels") or observation.get("labels") or [None]
        self.episode_done = observation.get("episode_done", False)
        candidates = list(observation.get("label_candidates") or [])
        dialog = Dialog(self.persona.copy(), self.history.copy(), candidates, self.answer)
        self.observation = {**observation, "dialog": dialog}
        return self.observation

    def self_observe(self, message: dict) -> None:
        """Take the agent's own reply for said where nothing told the gold one, as in a chat."""
        if self.answer is None:
            self.answer = message.get("text")

    def act(self) -> dict:
        """The reply to the last message."""
        (message,) = self.batch_act([self.observation])
        self.self_observe(message)
        return message

    @flags_named()
    def batch_act(self, observations: list[dict]) -> list[dict]:
        """Replies to the messages that copies of the agent have observed. Padding has no text and gets no reply."""
        messages: list[dict] = [{"id": self.id} for _ in observations]
        asked = [i for i, observation in enumerate(observations) if "text" in observation]
        dialogs = [observations[i]["dialog"] for i in asked]
        for i, dialog, result in zip(asked, dialogs, self.evaluator(self._turns(dialogs))):
            if "record" in self.opt:
                self.opt["record"](dialog, result)
            if "ranking" in result:
                messages[i]["text_candidates"] = [dialog.candidates[k] for k in result["ranking"]]
                messages[i]["text"] = messages[i]["text_candidates"][0]
            if "words" in result:
                messages[i]["metrics"] = perplexities(result)
            if "reply" in result:
                messages[i]["text"] = result["reply"]
        return messages

    @flags_named()
    def next_word_probability(self, partial_out: list[str]) -> dict[str, float]:
        """The probability of each word of the dictionary as the next one of the reply after these first ones.

        Raises:
            UserError: the agent does not measure ppl.
        """
        if self.evaluator.scorer is None:
            message = f"eval_type {self.evaluator.measured}: probabilities of words need ppl or all"
            raise SettingError(message, "eval_type")
        (turn,) = self._turns([self.observation["dialog"]])
        return self.evaluator.scorer.distribution(self.evaluator.model, turn, partial_out)

    def _turns(self, dialogs: list[Dialog]) -> list[Turn]:
        """Dialogs in token ids, all tokenised at once."""
        said = chain.from_iterable((*d.persona, *d.history, *d.candidates, d.label or "") for d in dialogs)
        texts = list(dict.fromkeys(said))
        ids = dict(zip(texts, tokenize(self.evaluator.tokenizer, texts)))
        self.first_texts.add(self.evaluator.tokenizer, ids)

        def encode(texts: list[str]) -> list[list[int]]:
            return [ids[text] for text in texts]

        turns = []
        for dialog in dialogs:
            history = encode(window(dialog.history, self.max_history))
            example = Example(encode(dialog.persona), history, encode(dialog.candidates))
            turns.append(Turn(example, dialog.candidates, dialog.label, ids[dialog.label or ""]))
        return turns


def all_flags(opt: dict) -> Namespace:
    """The agent's flags: ParlAI's options, and defaults for those that they lack."""
    parser = ArgumentParser("")
    add_evaluation_flags(parser)
    return Namespace(**vars(parser.parse_args([])) | opt)


@flags_named()
def load_evaluator(args: Namespace) -> Evaluator:
    """The evaluator that the agent's flags describe."""
    decoding = Decoding.of(args)
    set_seed(args.seed)
    model, tokenizer = load_finetuned(
        args.model_checkpoint, args.gpt_tokenization, args.device, args.history_start, args.fp16
    )

    def counts() -> dict[str, int]:
        if args.dict_file:
            return read_dictionary(args.dict_file)
        return count_words(read_dialogs(dataset_files(Path(args.datapath, "ConvAI2"))))

    return Evaluator(model, tokenizer, args.eval_type, decoding, counts=counts, gpt2_words=args.gpt2_ppl)


def perplexities(result: dict) -> dict[str, Perplexity]:
    """ParlAI's metrics of one turn: the perplexity of words, and beside it that of tokens."""
    losses = [nll(p) for _, p in result["words"] if p is not None]
    return {"ppl": Perplexity(math.fsum(losses), len(losses)), "token_ppl": Perplexity(*result["token_nll"])}

"""A model that talks to itself under two personas: what a long chat suffers from, and no figure of a turn shows."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from transfertransfo.data.dataset import TokenizedDataset
from transfertransfo.data.tokenization import text_of
from transfertransfo.decoding import Context, Decoding, generate
from transfertransfo.errors import SettingError
from transfertransfo.evaluation.metrics import content_words, copies, distinct_n, normalize
from transfertransfo.model.double_heads import DoubleHeads

EXCHANGES = 8  # of a chat, about as many as PersonaChat's dialogs have


class Talk(NamedTuple):
    """Lines of two speakers in turn. The first one opens the talk, the others are replies."""

    personas: tuple[list[str], list[str]]  # of the speaker who opens and of the other one; [] where it is not known
    turns: list[str]


def draw_dialogs(dialogs: Sequence[dict], count: int, seed: int) -> list[int]:
    """Places of so many dialogs, or of all, in which the partner speaks first, drawn by a seed (0 = anew each time).

    Raises:
        SettingError: there are fewer than two, which two personas need.
    """
    fit = [i for i, dialog in enumerate(dialogs) if dialog["utterances"] and dialog["utterances"][0]["history"]]
    if len(fit) < 2:
        message = "eval_type selfchat: needs at least two validation dialogs in which the partner speaks first"
        raise SettingError(message, "eval_type")
    return random.Random(seed or None).sample(fit, min(max(count, 2), len(fit)))


def selfchat(
    model: DoubleHeads,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset,
    decoding: Decoding,
    *,
    count: int,
    max_history: int,
    batchsize: int,
    seed: int,
) -> tuple[list[Talk], list[Talk]]:
    """The model's talks with itself, and beside them the people's of the dialogs that they begin with.

    A talk opens with a validation dialog's first line. The speaker who answers has that dialog's persona, the one who
    opens has another's. Then come `EXCHANGES` replies of either speaker.

    Raises:
        SettingError: as `draw_dialogs`.
    """
    texts, tokens = (dataset.dialogs("valid", sentences) for sentences in (dataset.texts, dataset.tokens))
    drawn = draw_dialogs(texts, count, seed)
    pairs = [(drawn[i - 1], own) for i, own in enumerate(drawn)]
    said = [[tokens[own]["utterances"][0]["history"][0]] for own in drawn]  # token ids of each talk's turns
    with tqdm(total=len(said) * 2 * EXCHANGES, desc="selfchat", unit=" replies", disable=None) as bar:
        for start in range(0, len(said), batchsize):
            part = slice(start, start + batchsize)
            for speaker in [1, 0] * EXCHANGES:
                contexts = [
                    Context.of(tokens[pair[speaker]]["personality"], turns, max_history)
                    for turns, pair in zip(said[part], pairs[part])
                ]
                for turns, reply in zip(said[part], generate(model, contexts, tokenizer, decoding)):
                    turns.append(reply)
                bar.update(len(contexts))
    talks, of_people = [], []
    for (other, own), turns in zip(pairs, said):
        opening, last = texts[own]["utterances"][0]["history"][0], texts[own]["utterances"][-1]
        replies = [text_of(tokenizer, ids) for ids in turns[1:]]
        talks.append(Talk((texts[other]["personality"], texts[own]["personality"]), [opening, *replies]))
        people_said = [*last["history"], last["candidates"][-1]]
        of_people.append(Talk(([], texts[own]["personality"]), people_said[: 2 * EXCHANGES + 1]))
    return talks, of_people


def measure(talks: Sequence[Talk]) -> dict[str, float]:
    """How often talks repeat and echo, and what they take from personas, over all replies. Opening lines are none.

    "repeated": share of replies that say over again an earlier one of the same speaker, word for word. "repeats": share
    that have four words in a row in common with an earlier one. "echoes": share that have so with an earlier turn of
    the partner. "persona_used": share of a persona's content words that its speaker's replies bring, all together.
    "words": of a reply. "empty": share. "distinct-2". Words are those of `metrics.normalize`, but for distinct-2.
    """
    repeated = repeats = echoes = empty = words = 0
    used: list[float] = []
    replies = []
    for talk in talks:
        for place, reply in enumerate(talk.turns[1:], 1):
            said = normalize(reply)
            own, partner = talk.turns[place % 2 : place : 2], talk.turns[1 - place % 2 : place : 2]
            repeated += bool(said) and any(said == normalize(turn) for turn in own)
            repeats += copies(reply, own)
            echoes += copies(reply, partner)
            empty += not said
            words += len(said)
            replies.append(reply)
        for speaker, persona in enumerate(talk.personas):
            if given := set(content_words(" ".join(persona))):
                brought = set(content_words(" ".join(talk.turns[2 - speaker :: 2])))
                used.append(len(given & brought) / len(given))
    n = len(replies)
    return {
        "replies": n,
        "repeated": repeated / n,
        "repeats": repeats / n,
        "echoes": echoes / n,
        "persona_used": sum(used) / len(used) if used else 0.0,
        "words": words / n,
        "empty": empty / n,
        "distinct-2": distinct_n((reply.lower().split() for reply in replies), 2),
    }

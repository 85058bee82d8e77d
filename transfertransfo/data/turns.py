"""Lists of turns -> the dialog of who replies: chat records, ParlAI's conversations, multi-session chat.

Chat records have roles: the system message is the persona, a sentence each, and each turn of the assistant a reply. Of
two speakers the second replies; both do where both have a persona. Turns of one side in a row are one turn.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from transfertransfo.data.fields import IDS, ORDER, PERSONA_NAMES, as_objects, renamed, sentences
from transfertransfo.data.parlai import PERSONA
from transfertransfo.data.reading import MAX_TURNS, Faults, kind

TURN_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns")
SPEAKER = ("role", "from", "speaker", "speaker_id", "speaker_idx", "author", "sender", "id")
TEXT = ("content", "value", "text", "utterance", "message")
SYSTEM, USER = {"system", "developer"}, {"user", "human", "prompter"}
MODEL = {"assistant", "gpt", "bot", "model", "chatbot", "chatgpt", "ai"}
TOOL = {"tool", "tools", "function", "function_call", "function_response", "tool_call", "tool_response", "observation",
        "ipython"}  # fmt: skip


class Said(NamedTuple):
    speaker: str
    text: str
    is_taught: bool = True  # axolotl's weight and train: a turn of the model that it is not to learn


def from_turns(record: dict, faults: Faults) -> list[dict]:
    """Chat records, ParlAI's conversations and sessions of multi-session chat."""
    field = next(name for name in TURN_LISTS if record.get(name) is not None)
    turns, speakers = as_objects(record[field]), record.get("speaker")
    if type(turns) is not list:
        raise ValueError(f"{field}: expected a list of turns, got {kind(turns)}")
    if turns and type(speakers) is list and len(speakers) == len(turns):  # two columns
        turns = [{"speaker": speaker, "text": text} for speaker, text in zip(speakers, turns)]
    try:
        said = merged(turns, faults)
    except ValueError as error:
        raise ValueError(f"{field}, {error}") from None
    return sides(said, personas_of(record, faults))


def personas_of(record: dict, faults: Faults) -> list[Any]:
    """What a record of turns says of personas: one of who replies, or one of each side."""
    pair: Any = record.get("personas")
    if {"persona1", "persona2"} <= record.keys():
        pair = [sentences(record["persona1"]), sentences(record["persona2"])]
    if type(pair) is list and len(pair) == 2 and type(pair[0]) is type(pair[1]) is list:
        return pair
    context = record.get("context")
    if type(context) is list and all(type(turn) is dict for turn in context):  # ParlAI's conversations
        lines = [line for turn in context for line in str(turn.get("text")).split("\n")]
        if persona := [match[2] for line in lines if (match := PERSONA.fullmatch(line)) and match[1].lower() == "your"]:
            return [persona]
    record = renamed(record, PERSONA_NAMES, faults)
    faults.leave(record.keys() - {*TURN_LISTS, *IDS, *ORDER, *SPEAKER, *TEXT, "personality", "system"})
    persona = sentences(record.get("personality") or [])
    return [_longer(persona, sentences(record["system"])) if type(record.get("system")) is str else persona]


def _longer(persona: Any, more: Any) -> list:
    """A persona with more sentences."""
    if persona is None or type(persona) is list:
        return [*(persona or []), *more]
    raise ValueError(f"personality: expected a list of strings, got {kind(persona)}")


def merged(turns: list, faults: Faults) -> list[Said]:
    """The turns with their speakers, those of one side in a row joined to one."""
    said: list[Said] = []
    for number, turn in enumerate(_flat(turns), 1):
        if type(turn) is str:
            turn = {"speaker": str(2 - number % 2), "text": turn}
        if type(turn) is not dict:
            raise ValueError(f"turn {number}: expected an object, got {kind(turn)}")
        try:
            new = _one_turn(turn)
        except ValueError as error:
            raise ValueError(f"turn {number}, {error}") from None
        if said and said[-1].speaker == new.speaker:
            joined = " ".join(text for text in (said[-1].text, new.text) if text.strip())
            new = Said(new.speaker, joined, said.pop().is_taught and new.is_taught)
            if new.speaker not in SYSTEM:
                faults.note("several turns of one side in a row are read as one")
        said.append(new)
    return said


def _flat(turns: list) -> Iterator[Any]:
    """The turns, those of ParlAI's exchanges one by one."""
    for turn in turns:
        yield from turn if type(turn) is list else [turn]


def _one_turn(turn: dict) -> Said:
    """A turn's speaker, in lower case, and its text. ValueError where it has none."""
    field = next((name for name in SPEAKER if turn.get(name) is not None), None)
    if field is None:
        raise ValueError(f"no {' or '.join(SPEAKER[:3])}")
    speaker = str(turn[field]).strip().lower()
    if speaker in TOOL or turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"{field} {str(turn[field])[:30]!r}: a turn of tools: leave such dialogs out")
    name = next((name for name in TEXT if turn.get(name) is not None), None)
    if name is None:
        raise ValueError(f"no {' or '.join(TEXT[:3])}")
    text = turn[name]
    if type(text) is list:
        text = " ".join(map(_part, text))
    if type(text) is not str:
        raise ValueError(f"{name}: expected a string, got {kind(text)}")
    return Said(speaker, text, turn.get("weight") != 0 and turn.get("train") is not False)


def _part(part: Any) -> str:
    """The text of a part of a turn."""
    text = part.get("text") if type(part) is dict else part
    if type(text) is not str or (type(part) is dict and part.get("type", "text") != "text"):
        name = repr(str(part.get("type"))[:30]) if type(part) is dict else kind(part)
        raise ValueError(f"a part that is no text: {name}")
    return text


def sides(said: list[Said], personas: list[Any]) -> list[dict]:
    """The dialog of the side that replies, or of each side where both have a persona."""
    spoken = [turn.speaker for turn in said]
    if {*spoken} & (SYSTEM | USER | MODEL):
        return [_from_chat(said, personas[0])]
    speakers = [*dict.fromkeys(spoken)]
    if len(speakers) != 2:
        raise ValueError(f"expected two speakers, got {len(speakers)}: {', '.join(speakers)[:100]}")
    if len(personas) == 2:  # in the order of the speakers' numbers, else of who begins
        numbered = all(speaker[-1:].isdigit() for speaker in speakers)
        sides = zip(sorted(speakers) if numbered else speakers, personas)
        return [_side(said, speaker, persona) for speaker, persona in sides]
    return [_side(said, speakers[1], personas[0])]


def _from_chat(said: list[Said], persona: Any) -> dict:
    """Each turn of the assistant is a reply; the system message, in front of all, is the persona."""
    for turn in said:
        if turn.speaker not in SYSTEM | USER | MODEL:
            raise ValueError(f"role {turn.speaker[:30]!r} is unknown: expected system, user (human) or assistant (gpt)")
    if said and said[0].speaker in SYSTEM:
        persona = _longer(persona, sentences(said[0].text))
        said = said[1:]
    if any(turn.speaker in SYSTEM for turn in said):
        raise ValueError("a system message after the first turn")
    sides = [turn._replace(speaker="model" if turn.speaker in MODEL else "user") for turn in said]
    return _side(sides, "model", persona)


def _side(said: list[Said], me: str, persona: Any) -> dict:
    """The dialog of one speaker. A text in front of all that says `your persona:` is no turn."""
    if len(said) > MAX_TURNS:
        raise ValueError(f"a dialog of more than {MAX_TURNS} turns")
    history: list[str] = []
    utterances = []
    for speaker, text, is_taught in said:
        if speaker == me and is_taught:
            utterances.append({"history": history.copy(), "reply": text})
        elif not history and PERSONA.match(text):  # ParlAI's, said to who replies
            lines = [(line, PERSONA.fullmatch(line)) for line in text.split("\n")]
            persona = _longer(persona, [match[2] for _, match in lines if match and match[1].lower() == "your"])
            text = " ".join(line for line, match in lines if not match)
        history += [text] if text.strip() else []
    return {"personality": persona, "utterances": utterances}


# Synthetic-Persona-Chat


def synthetic(record: dict, faults: Faults) -> list[dict]:
    """Two users, their personas a sentence a line, and `User 1: ...` lines."""
    said: list[dict] = []
    for line in str(record["best_generated_conversation"] or "").splitlines():
        if match := re.match(r"\s*(user ?[12])\s*:\s*(.*)", line, re.IGNORECASE):
            said.append({"speaker": match[1].replace(" ", ""), "text": match[2]})
        elif said:
            said[-1]["text"] += f" {line.strip()}"
        elif line.strip():
            raise ValueError("Best Generated Conversation: expected lines that begin with User 1: or User 2:")
    return sides(merged(said, faults), [sentences(record.get(f"user_{n}_personas") or []) for n in (1, 2)])

"""Lists of turns -> the dialog of who replies: chat records, ParlAI's conversations, multi-session chat.

Chat records have roles: the system message is the persona, a sentence each, and each turn of the assistant a reply. Of
two speakers the second replies; both do where both have a persona. Turns of one side in a row are one turn.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from transfertransfo.data.fields import PERSONA_NAMES, PLACE, as_list, as_objects, renamed, sentences
from transfertransfo.data.parlai import PERSONA
from transfertransfo.data.reading import MAX_TURNS, Faults, kind

TURN_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "utterances")
SPEAKER = ("role", "from", "speaker", "speaker_id", "speaker_idx", "author", "sender", "id")
TEXT = ("content", "value", "text", "utterance", "message")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatbot", "chatgpt", "ai"), "model"),
}
TOOL = {"tool", "tools", "function", "function_call", "function_response", "tool_call", "tool_response", "observation",
        "ipython"}  # fmt: skip
NO_TEXT = re.compile("image|audio|video|file|tool|thinking|reasoning")  # of a part of a turn, though it has a text
NAMED = re.compile(r"\s*([^\W\d_][\w .'-]{0,30}?)\s*:(?!//)\s*(.*)", re.DOTALL)


class Said(NamedTuple):
    speaker: str
    text: str
    is_taught: bool = True  # the masks of axolotl and others: a turn of the model that it is not to learn
    persona: Any = None  # the speaker's own, where the turns say it


def turn_list(record: dict) -> str | None:
    """The field of a record that holds a list of turns."""
    return next((name for name in TURN_LISTS if _may_be_list(record.get(name))), None)


def _may_be_list(value: object) -> bool:
    return type(value) in (list, dict) or (type(value) is str and value.lstrip().startswith("["))


def from_turns(record: dict, faults: Faults) -> list[dict]:
    """Chat records, ParlAI's conversations and sessions of multi-session chat. ValueError where a turn is none."""
    field = str(turn_list(record))
    turns, speakers = as_objects(record[field]), as_list(record.get("speaker") or record.get("speakers"))
    if type(turns) is not list:
        raise ValueError(f"{field}: expected a list of turns, got {kind(turns)}")
    if turns and type(speakers) is list and is_texts(turns):  # two columns
        if len(speakers) != len(turns):
            raise ValueError(f"{field}: {len(speakers)} speakers of {len(turns)} turns")
        turns = [{"speaker": speaker, "text": text} for speaker, text in zip(speakers, turns)]
    is_many = field == "conversations" and turns and all(turn and is_texts(turn) for turn in turns)  # ChatterBot's
    dialogs = []
    for conversation in turns if is_many else [turns]:
        try:
            said = merged(conversation, faults)
        except ValueError as error:
            raise ValueError(f"{field}, {error}") from None
        said = with_roles(said)
        dialogs += sides(said, *personas_of(record, said, faults))
    return dialogs


def is_texts(value: object) -> bool:
    """Whether a value is a list of strings."""
    return type(value) is list and all(type(text) is str for text in value)


def from_prompt(record: dict, faults: Faults) -> list[dict]:
    """TRL's conversational prompt and completion: of the model's turns those of the completion are learnt."""
    prompt, completion = as_objects(record["prompt"]), as_objects(record["completion"])
    prompt = [turn | {"train": False} if type(turn) is dict else turn for turn in prompt]
    rest = {name: value for name, value in record.items() if name not in ("prompt", "completion")}
    return from_turns(rest | {"messages": [*prompt, *completion]}, faults)


def is_prompt(record: dict) -> bool:
    """Whether a record is a prompt and a completion that are both lists of turns."""
    return all(type(as_objects(record.get(name))) is list for name in ("prompt", "completion"))


# Personas


def personas_of(record: dict, said: list[Said], faults: Faults) -> tuple[list, dict[str, Any]]:
    """The persona of who replies, whoever it is, and the persona of each speaker, out of a record of turns.

    Raises:
        ValueError: no persona can be made of it, or the turns of a speaker say two.
    """
    told: dict[str, Any] = {}
    for turn in said:
        if turn.persona and told.setdefault(turn.speaker, turn.persona) != turn.persona:
            raise ValueError(f"speaker {turn.speaker[:30]!r}: two different personas")
    one = next(iter(told.values()), None)
    if any(persona != one for persona in told.values()):
        return _system(record), told
    if one is None and (pair := _pair(record, said, faults)):
        return _system(record), pair
    record = renamed(record, PERSONA_NAMES, faults)
    system = {"system", "system_prompt"}
    faults.leave(record.keys() - {*TURN_LISTS, *PLACE, *SPEAKER, *TEXT, *system, "speakers", "personality"})
    persona = one or joined(*_contexts(record)) or sentences(record.get("personality") or [])
    return joined(persona, _system(record)), {}


def _pair(record: dict, said: list[Said], faults: Faults) -> dict[str, Any]:
    """The personas of the two speakers: in the order of the speakers' numbers, else of who begins."""
    speakers = [*dict.fromkeys(turn.speaker for turn in said if turn.speaker != "system")]
    pair: Any = record.get("personas")
    if {"persona1", "persona2"} <= record.keys():
        pair = [sentences(record[name] or []) for name in ("persona1", "persona2")]
    kinds = [type(persona) for persona in pair] if type(pair) is list else []
    if len(kinds) == 2 and list in kinds and {*kinds} <= {list, type(None)}:
        is_numbered = all(speaker[-1:].isdigit() for speaker in speakers)
        return dict(zip(sorted(speakers) if is_numbered else speakers, pair))
    contexts = _contexts(record)
    if len(contexts) == 2 and any(contexts):
        # ParlAI's SelfChatWorld, since pull request 2583 of 2020: the i-th is shown to the i-th who speaks
        faults.note("of two contexts the first is read as that of who begins")
        return dict(zip(speakers, contexts))
    return {}


def _contexts(record: dict) -> list[list[str]]:
    """The persona in each `context` of ParlAI's conversations."""
    context = record.get("context")
    if type(context) is not list or not all(type(turn) is dict for turn in context):
        return []
    return [told_persona(str(turn.get("text")))[0] for turn in context]


def told_persona(text: str) -> tuple[list[str], str]:
    """The `your persona:` sentences among the lines of a text, and what else it says."""
    lines = [(line, PERSONA.fullmatch(line)) for line in text.split("\n")]
    own = [match[2] for _, match in lines if match and match[1].lower() == "your"]
    return own, " ".join(line for line, match in lines if not match)


def _system(record: dict) -> list:
    """The sentences of a system message beside the turns: a text, a list of texts, or of parts."""
    system = as_list(record.get("system") or record.get("system_prompt") or [])
    parts = [system] if type(system) is str else system
    if type(parts) is not list:
        raise ValueError(f"system: expected a string, got {kind(system)}")
    return [sentence for part in parts for sentence in sentences(_part(part))]


def joined(*personas: Any) -> list:
    """One persona of several, any of which may be missing."""
    for persona in personas:
        if persona is not None and type(persona) is not list:
            raise ValueError(f"personality: expected a list of strings, got {kind(persona)}")
    return [sentence for persona in personas for sentence in persona or []]


# Turns


def merged(turns: list, faults: Faults) -> list[Said]:
    """The turns with their speakers, those of one side in a row joined to one."""
    said: list[Said] = []
    for number, turn in enumerate(_with_names([*_flat(turns)], faults), 1):
        if type(turn) is str:
            turn = {"speaker": str(2 - number % 2), "text": turn}
        if type(turn) is not dict:
            raise ValueError(f"turn {number}: expected an object, got {kind(turn)}")
        try:
            new = _one_turn(turn)
        except ValueError as error:
            raise ValueError(f"turn {number}, {error}") from None
        if said and said[-1].speaker == new.speaker:
            last = said.pop()
            text = " ".join(text for text in (last.text, new.text) if text.strip())
            new = Said(new.speaker, text, last.is_taught and new.is_taught, last.persona or new.persona)
            if ROLES.get(new.speaker) != "system":
                faults.note("several turns of one side in a row are read as one")
        said.append(new)
    return said


def _flat(turns: list) -> Iterator[Any]:
    """The turns, those of ParlAI's exchanges one by one, and blended_skill_talk's pairs as speaker and text."""
    for turn in turns:
        if type(turn) is list and [*map(type, turn)] == [int, str]:
            yield {"speaker": turn[0], "text": turn[1]}
        else:
            yield from turn if type(turn) is list else [turn]


def _with_names(turns: list, faults: Faults) -> list:
    """Strings that all begin with one of two names and a colon, as turns of these speakers."""
    matches = [NAMED.fullmatch(turn) for turn in turns if type(turn) is str]
    found = [match for match in matches if match]
    if len(found) < len(turns) or len({match[1].lower() for match in found}) != 2:
        return turns
    faults.note("a name and a colon in front of each turn are read as its speaker")
    return [{"speaker": match[1], "text": match[2]} for match in found]


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
    is_taught = turn.get("weight") not in (0, "0", "0.0") and False not in (turn.get("train"), turn.get("loss"))
    persona = sentences(next((turn[name] for name in ("personality", *PERSONA_NAMES) if turn.get(name)), None))
    return Said(speaker, text, is_taught, persona if is_texts(persona) else None)


def _part(part: Any) -> str:
    """The text of a part of a turn."""
    text = part.get("text") if type(part) is dict else part
    if type(text) is not str or (type(part) is dict and NO_TEXT.search(str(part.get("type")))):
        name = repr(str(part.get("type"))[:30]) if type(part) is dict else kind(part)
        raise ValueError(f"a part that is no text: {name}")
    return text


def with_roles(said: list[Said]) -> list[Said]:
    """The turns with `system`, `user` and `model` for their speakers, where one of them is known as such.

    Raises:
        ValueError: others are not.
    """
    roles = {turn.speaker: ROLES.get(turn.speaker) for turn in said}
    if not any(roles.values()):
        return said
    if "model" not in roles.values() and any(roles[turn.speaker] == "system" for turn in said[1:]):
        roles = {speaker: "model" if role == "system" else role for speaker, role in roles.items()}  # MultiWOZ, SGD
    known, unknown = {*roles.values()} & {"user", "model"}, [speaker for speaker in roles if not roles[speaker]]
    if len(unknown) == 1 and len(known) == 1:  # as of a customer and an assistant
        roles[unknown[0]] = "user" if known == {"model"} else "model"
    elif unknown:
        raise ValueError(f"role {unknown[0][:30]!r} is unknown: expected system, user (human) or assistant (gpt)")
    return [turn._replace(speaker=str(roles[turn.speaker])) for turn in said]


def sides(said: list[Said], persona: Any, own: dict[str, Any]) -> list[dict]:
    """The dialog of who replies, with its persona; of two speakers who have their own, that of each.

    Raises:
        ValueError: nobody can be told to reply.
    """
    is_chat = any(turn.speaker in ROLES for turn in said)
    if said and said[0].speaker == "system":
        persona, said = joined(persona, sentences(said[0].text)), said[1:]
    speakers = [*dict.fromkeys(turn.speaker for turn in said)]
    if "system" in speakers:
        raise ValueError("a system message after the first turn")
    if not is_chat and len(speakers) != 2:
        raise ValueError(f"expected two speakers, got {len(speakers)}: {', '.join(speakers)[:100]}")
    replying = ["model"] if is_chat else [*own] or speakers[1:]
    return [_side(said, speaker, joined(own.get(speaker), persona)) for speaker in replying]


def _side(said: list[Said], me: str, persona: list) -> dict:
    """The dialog of one speaker. A text in front of all that says `your persona:` is no turn.

    A blank turn keeps its place, since the sides of a history are told by counting back from the reply.
    """
    if len(said) > MAX_TURNS:
        raise ValueError(f"a dialog of more than {MAX_TURNS} turns")
    history: list[str] = []
    utterances = []
    for turn in said:
        text = turn.text if turn.text.strip() else ""
        if turn.speaker == me and turn.is_taught and text:
            utterances.append({"history": history.copy(), "reply": text})
        elif not history and PERSONA.match(text):  # ParlAI's, said to who replies
            told, text = told_persona(text)
            persona = [*persona, *told]
        if history or text.strip():
            history.append(text)
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
    own = {f"user{n}": sentences(record.get(f"user_{n}_personas") or []) for n in (1, 2)}
    return sides(merged(said, faults), [], own)

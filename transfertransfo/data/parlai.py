"""ParlAI's text, in and out.

`N your persona: text` and `N text<TAB>reply[<TAB>reward[<TAB>cand|cand]]` lines. A number N that does not grow starts a
new dialog, and so does a blank line. The history is all that was said before; an empty text or `__SILENCE__` adds
nothing to it, and ParlAI's `\\n` in a text separates turns and persona lines, in a reply it is a line's end. Of several
replies `a|b` beside candidates the first is the gold. `N partner's persona: text` lines are left out: the model
conditions on its own persona only.

`text:...<TAB>labels:...<TAB>label_candidates:...<TAB>episode_done:True` lines say the same with names.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from transfertransfo.data.reading import MAX_TURNS, Faults, Lines, Records, SharedTexts
from transfertransfo.errors import UserError
from transfertransfo.files import open_atomically

TOO_LONG = f"a dialog of more than {MAX_TURNS} turns: each dialog must number its lines from 1"
UNCLEAR = "a blank line, and the number goes on: number each dialog from 1, or leave the blank lines out"
NUMBERED = re.compile(r"([0-9]{1,9}) (.*)", re.DOTALL)
OWN_PERSONA, PARTNER_PERSONA = "your persona:", "partner's persona:"
PERSONA = re.compile(r"\s*(your|partner['’]?s)\s+persona\s*:[ \t]?(.*)", re.DOTALL | re.IGNORECASE)
SILENCE = "__SILENCE__"
FIELDS = re.compile(r"(?:^|\t)([a-z_]+):")
INDENT = "    "  # for the tab, in a file without any


class Dialog:
    """A dialog while its lines are read.

    Attributes:
        turns: all that was said so far.
        lines, gaps: how many lines there were, and blank ones between them.
        is_whole: no line of it has a fault.
    """

    def __init__(self, place: str):
        self.place, self.is_whole, self.lines, self.gaps = place, True, 0, 0
        self.record: dict = {"personality": [], "utterances": []}
        self.turns: list[str] = []

    def add(self, text: str, replies: list[str] | None, candidates: list[str], texts: SharedTexts) -> None:
        """Add what a line says: `text` to the persona and the history, and the reply, if the line has one.

        A line with a reply says persona sentences only in front of a dialog's first turn.
        """
        for part in text.split("\\n"):
            may_be_persona = replies is None or ("\\n" in text and not self.turns and not self.record["utterances"])
            if match := PERSONA.fullmatch(part) if may_be_persona else None:
                if match[1].lower() == "your":
                    self.record["personality"].append(texts[match[2]])
            elif part and part.strip() != SILENCE:
                self.turns.append(texts[part])
        if replies is None:
            return
        utterance: dict = {"history": self.turns.copy(), "reply": texts[_unescaped(replies[0])]}
        if candidates:
            utterance["candidates"] = [texts[_unescaped(candidate)] for candidate in candidates]
        self.turns.append(utterance["reply"])
        self.record["utterances"].append(utterance)


def parlai_dialogs(lines: Lines, texts: SharedTexts, faults: Faults) -> Records:
    """The dialogs of numbered lines."""
    dialog, number, last_line, has_tabs = Dialog(""), 10**9, 0, False
    for line_number, line, fault in lines:
        match = NUMBERED.fullmatch(line)
        blank_before, last_line = 0 < last_line < line_number - 1, line_number
        if match and (int(match[1]) <= number or (blank_before and _begins_anew(dialog, match[2]))):
            if dialog.place:
                yield dialog.place, dialog.record, dialog.is_whole
            dialog = Dialog(f" (line {line_number})")
        elif match and blank_before and dialog.turns:
            fault = f"line {line_number}: {UNCLEAR}"
        dialog.gaps += blank_before and bool(dialog.lines)
        has_tabs = has_tabs or "\t" in line
        if not match:
            fault = fault or f"line {line_number}: expected a number, a space and a text"
        elif len(dialog.turns) <= MAX_TURNS:  # else that has been said already
            _read_line(dialog, match[2], has_tabs, texts, faults)
            if len(dialog.turns) > MAX_TURNS:
                fault = f"line {line_number}: {TOO_LONG}"
        number = int(match[1]) if match else number
        dialog.lines += 1
        if fault:
            faults.append(fault)
            dialog.is_whole = False
    if dialog.place:
        yield dialog.place, dialog.record, dialog.is_whole


def _begins_anew(dialog: Dialog, line: str) -> bool:
    """Whether a line whose number goes on after a blank line is another dialog's: not where all lines stand apart."""
    return bool(dialog.turns) and (bool(PERSONA.match(line)) or (dialog.lines > 1 and not dialog.gaps))


def _read_line(dialog: Dialog, line: str, has_tabs: bool, texts: SharedTexts, faults: Faults) -> None:
    """Add a line, its number cut off, to the dialog."""
    if not has_tabs and INDENT in line.strip() and not PERSONA.match(line):
        line = "\t".join(part.strip() for part in line.split(INDENT))
        faults.note("no tabs in this file: four spaces are read as one")
    text, *fields = line.split("\t")
    reply = fields[0] if fields else ""
    candidates = fields[2].split("|") if len(fields) > 2 and fields[2] else []
    replies = reply.split("|")
    if len(replies) > 1 and replies[0] not in candidates:
        replies = [reply]
        faults.note("a reply with | in it is no list of its candidates, and is taken whole")
    dialog.add(text, replies if fields else None, candidates, texts)


def parlai_fields(lines: Lines, texts: SharedTexts, faults: Faults) -> Records:
    """The dialogs of `text:` lines, each up to its `episode_done:True`."""
    dialog = Dialog("")
    for line_number, line, fault in lines:
        if not dialog.lines:
            dialog = Dialog(f" (line {line_number})")
        dialog.lines += 1
        _, *parts = FIELDS.split(line)
        fields = dict(zip(parts[::2], (part.replace("\\t", "\t") for part in parts[1::2])))
        labels = fields.get("labels", fields.get("eval_labels"))
        if "text" not in fields and labels is None:
            fault = fault or f"line {line_number}: expected text: and labels: fields between tabs"
        elif len(dialog.turns) <= MAX_TURNS:  # else that has been said already
            dialog.add(fields.get("text", ""), _parts(labels) or None, _parts(fields.get("label_candidates")), texts)
            if len(dialog.turns) > MAX_TURNS:
                fault = f"line {line_number}: a dialog of more than {MAX_TURNS} turns: no episode_done:True"
        if fault:
            faults.append(fault)
            dialog.is_whole = False
        if fields.get("episode_done", "").strip().lower() == "true":
            yield dialog.place, dialog.record, dialog.is_whole
            dialog = Dialog("")
    if dialog.lines:
        yield dialog.place, dialog.record, dialog.is_whole


def _parts(field: str | None) -> list[str]:
    return [part.replace("__PIPE__", "|") for part in field.split("|")] if field else []


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n")


def write_parlai(dialogs: list[dict], path: Path) -> None:
    """Write one split as ParlAI text with candidates, a line an utterance; `read_dialogs` gives the same dialogs back.

    An utterance whose history does not go on from the one before starts a new dialog there. What the format cannot
    carry (a tab, a line's end, `\\n`, and `|` in a reply) becomes a space.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with open_atomically(Path(path)) as file:
            for dialog in dialogs:
                for episode in _episodes(dialog):
                    file.writelines(f"{number} {line}\n".encode() for number, line in enumerate(episode, 1))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _episodes(dialog: dict) -> Iterator[list[str]]:
    """The lines, not yet numbered, of a dialog: one list where each history goes on from the one before."""
    persona = [f"{OWN_PERSONA} {_written(text)}" for text in dialog["personality"]]
    episode: list[str] = []
    turns: list[str] = []
    for utterance in dialog["utterances"]:
        history, candidates = utterance["history"], [_written(text, "|") for text in utterance["candidates"]]
        if episode and history[: len(turns)] != turns:
            yield episode
            episode, turns = [], []
        text = "\\n".join(_written(turn) for turn in history[len(turns) :])
        episode = (episode or persona) + [f"{text}\t{candidates[-1]}\t\t{'|'.join(candidates)}"]
        turns = [*history, utterance["candidates"][-1]]
    yield episode


def _written(text: str, separators: str = "") -> str:
    return re.sub(rf"\\n|[\t\r\n{separators}]", " ", text)

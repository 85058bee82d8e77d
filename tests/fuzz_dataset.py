"""Feed mutated datasets to the reader: each must end in a dataset or in clear lines, soon and in little memory.

python tests/fuzz_dataset.py                # 1,000 mutants of each format
python tests/fuzz_dataset.py --mutants 100  # what the tests do

The mutants are seeded: bytes flipped, cut out or doubled; fields and cells removed, retyped, nested, made huge.
"""

import argparse
import copy
import csv
import gzip
import io
import json
import logging
import lzma
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from transfertransfo.data.dialogs import read_dialogs  # noqa: E402
from transfertransfo.data.parlai import write_parlai  # noqa: E402
from transfertransfo.data.personas import draw_persona  # noqa: E402
from transfertransfo.errors import UserError  # noqa: E402

MAX_SECONDS, MAX_BYTES = 5, 10**9
ODD = [None, 0, -1, 1e400, 10**400, True, "", " ", "\0", "\ud800", "\u202e", "🙂" * 9, "x" * 10**6, [], {}, [[[]]],
       ["a"], {"a": 1}, [None], "tool", "user", "assistant", {"type": "image_url"}]  # fmt: skip
CELLS = ["", " ", "0", "-1", "9" * 5000, "[", "[]", "[[]]", "[" * 10**5, "['a' 'b']", "['a', 'b']", '["a"]',
         '[{"a": 1}]', "{}", "[1e999]", "nan", "\0", "\n", '"', "🙂", "x" * 10**6, "history", "messages"]  # fmt: skip


def base_files(folder: Path) -> dict[str, bytes]:
    """A small dataset in each format."""
    example = json.loads((ROOT / "example" / "personachat.json").read_text())
    dialogs = {"train": example["train"][:6], "valid": example["valid"][:2]}
    write_parlai(dialogs["train"], folder / "parlai.txt")
    return {
        "json": json.dumps(dialogs).encode(),
        "jsonl": "\n".join(map(json.dumps, dialogs["train"])).encode(),
        "parlai": (folder / "parlai.txt").read_bytes(),
        "chat": "\n".join(json.dumps(chat_record(dialog, n)) for n, dialog in enumerate(dialogs["train"])).encode(),
        "csv": csv_rows(dialogs["train"]).encode(),
    }


def chat_record(dialog: dict, number: int) -> dict:
    """The dialog as chat records: every second one in the other spelling, and with texts in parts."""
    *_, last = dialog["utterances"]
    turns = [("system", " ".join(dialog["personality"]))]
    turns += [(("user", "assistant")[n % 2], text) for n, text in enumerate([*last["history"], last["candidates"][-1]])]
    if number % 2:
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        return {"id": number, "conversations": [{"from": names[role], "value": text} for role, text in turns]}
    return {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]}


def csv_rows(dialogs: list[dict]) -> str:
    """The dialogs as rows of one reply, lists as JSON."""
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(["conv_id", "persona", "history", "candidates", "label"])
    for number, dialog in enumerate(dialogs):
        for utterance in dialog["utterances"]:
            lists = [dialog["personality"], utterance["history"], utterance["candidates"]]
            writer.writerow([number, *map(json.dumps, lists), len(utterance["candidates"]) - 1])
    return rows.getvalue()


def mutate_rows(generator: random.Random, content: str) -> str:
    """CSV with cells replaced, left out, doubled or moved."""
    rows = list(csv.reader(io.StringIO(content)))
    for _ in range(generator.choice([1, 2, 20])):
        row = generator.choice(rows)
        place = generator.randrange(len(row) or 1)
        cells = [generator.choice(CELLS), *generator.choice(rows)]
        row[place : place + generator.choice([0, 1, 1, 1, 2])] = cells[: generator.choice([0, 1, 1, 1, 2])]
    text = io.StringIO()
    csv.writer(text, delimiter=generator.choice(",,,\t;|")).writerows(rows)
    return text.getvalue()


def mutate_bytes(generator: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut out or doubled; sometimes compressed before or after."""
    packed = generator.choice([bytes, bytes, bytes, gzip.compress, lzma.compress])
    late = generator.random() < 0.5
    mutant = bytearray(content if late else packed(content))
    for _ in range(generator.choice([1, 1, 3, 30])):
        start = generator.randrange(len(mutant) or 1)
        end = min(len(mutant), start + generator.choice([1, 10, 1000]))
        match generator.randrange(4):
            case 0:
                mutant[start : start + 1] = bytes([generator.randrange(256)])
            case 1:
                del mutant[start:end]
            case 2:
                mutant[start:start] = mutant[start:end] * generator.choice([1, 20])
            case 3 if generator.random() < 0.2:
                del mutant[start:]
    return packed(bytes(mutant)) if late else bytes(mutant)


def mutate_tree(generator: random.Random, value):
    """A JSON value with something in it removed, replaced, nested or repeated."""
    if generator.random() < 0.9 and isinstance(value, dict | list) and value:
        key = generator.choice(list(value)) if isinstance(value, dict) else generator.randrange(len(value))
        action = generator.random()
        if action < 0.8:
            value[key] = mutate_tree(generator, value[key])
        elif action < 0.9:
            del value[key]
        elif isinstance(value, list):
            value += copy.deepcopy(value[: generator.choice([1, 100])])
        return value
    if generator.random() < 0.1:
        return json.loads("[" * 90 + "1" + "]" * 90)
    return copy.deepcopy(generator.choice(ODD))


def make_mutant(generator: random.Random, kind: str, content: bytes) -> bytes:
    if kind == "csv" and generator.random() < 0.5:
        return mutate_rows(generator, content.decode()).encode()
    if kind == "csv" or kind == "parlai" or generator.random() < 0.5:
        return mutate_bytes(generator, content)
    lines = [json.loads(line) for line in content.decode().split("\n")]
    for _ in range(generator.choice([1, 2, 20])):
        place = generator.randrange(len(lines))
        lines[place] = mutate_tree(generator, lines[place])
    return "\n".join(map(json.dumps, lines)).encode()


def check(path: Path) -> str:
    """Read one file, with its faults and without, and draw a persona; "dataset" or "refused".

    AssertionError where that ended in anything else.
    """
    splits, without_bad, persona = (
        end_of(path, function, *arguments)
        for function, *arguments in ((read_dialogs, False), (read_dialogs, True), (draw_persona, False))
    )
    assert splits is None or splits == without_bad
    "".join(persona or []).encode()
    for dialogs in (without_bad or {}).values():
        assert dialogs
        for dialog in dialogs:
            texts = list(dialog["personality"])
            for utterance in dialog["utterances"]:
                assert utterance["candidates"][-1].strip(), "no gold reply"
                texts += utterance["candidates"] + utterance["history"]
            "".join(texts).encode()  # strings, and such that UTF-8 has them
    return "dataset" if splits else "refused"


def end_of(path: Path, read: Callable, skip_bad_dialogs: bool):
    """What reading gives, or None where it is refused in clear lines."""
    try:
        return read([path], skip_bad_dialogs)
    except UserError as error:
        lines = str(error).split("\n")
        assert len(lines) <= 11, f"{len(lines)} lines"
        assert all(path.name in line for line in lines[:1]), lines[0]
        assert all(0 < len(line) < 1000 for line in lines), "an empty or an endless line"
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=1000, help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.getLogger("transfertransfo").addHandler(logging.NullHandler())  # what is left out is not shown
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    failed, ends, slowest = 0, Counter(), 0.0
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "mutant.bin"
        kinds = base_files(Path(name))
        for kind, content in kinds.items():
            for number in range(args.mutants):
                seed = f"{args.seed} {kind} {number}"
                path.write_bytes(make_mutant(random.Random(seed), kind, content))
                start = time.process_time()  # another program may have the processor meanwhile
                try:
                    end = check(path)
                    seconds = time.process_time() - start
                    assert seconds < MAX_SECONDS, f"{seconds:.1f} s"
                except Exception as error:
                    failed += 1
                    print(f"FAILED {seed}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                slowest = max(slowest, seconds)
                ends[f"{kind} {end}"] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used
    failed += grown > MAX_BYTES
    total = len(kinds) * args.mutants
    print(f"{total - failed} of {total} end well: {dict(ends)}; slowest {slowest:.2f} s, memory + {grown / 1e6:.0f} MB")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Load mutated checkpoints: each must be refused in one line, or load and reply, soon and in little memory.

    python tests/fuzz_checkpoint.py                # 1,000 mutants
    python tests/fuzz_checkpoint.py --mutants 15   # what the tests do

The mutants are seeded: of configurations, adapters' configurations and tokenizers, of several families in turn, values
are removed, retyped, nested, made huge, or bytes flipped, cut out and doubled. Each is loaded in a process of its own.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from fuzz_dataset import ODD, mutate_bytes, mutate_tree  # noqa: E402
from helpers import dialogs_of_text, tiny_config, write_tokenizer  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from transfertransfo.decoding import Context, Decoding, generate  # noqa: E402
from transfertransfo.errors import UserError  # noqa: E402
from transfertransfo.model.double_heads import add_adapter_, add_special_tokens_  # noqa: E402
from transfertransfo.model.loading import load_finetuned, load_model  # noqa: E402
from transfertransfo.model.saving import save_model  # noqa: E402
from transfertransfo.model.sources import load_tokenizer  # noqa: E402

MAX_SECONDS, MAX_BYTES = 10, 2 * 10**9  # of a processor; of memory
FAMILIES = ("gpt", "gpt2", "llama", "gpt_neox", "gemma3_text")
FILES = {
    "config": ("config.json", "config.json", "config.json", "generation_config.json"),
    "adapter": ("adapter_config.json", "adapter_config.json", "config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
}
HOSTILE = [
    *ODD, 2, 3, 30_000, 10**9, 0.5, -1e30, float("nan"), "(a+)+$", "\x1b[2J\x07\r\x9b", [1] * 10**5, "gelu", "llama",
    "gpt2", "mamba", "float16", "cuda", "../../etc/passwd", {"0": [[]] * 99}, ["lm_head"], "all-linear",
]  # fmt: skip


def make_checkpoints(top: Path) -> Iterator[tuple[str, Path]]:
    """A kind of file and a folder that has it, for each family: tiny models with dialog tokens and adapters on them."""
    texts = dialogs_of_text(json.loads((ROOT / "example" / "personachat.json").read_text()))
    for family in FAMILIES:
        torch.manual_seed(1)
        base = top / family
        write_tokenizer(family, texts, base)
        tiny_config(family, len(load_vocabulary(base))).save_pretrained(base)
        model, tokenizer = load_model(base, from_scratch=True), load_tokenizer(base)
        add_special_tokens_(model, tokenizer)
        save(model, tokenizer, base)
        yield "config", base
        yield "tokenizer", base
        add_adapter_(model, tokenizer, rank=2, base=str(base))
        save(model, tokenizer, top / f"{family}-adapter")
        yield "adapter", top / f"{family}-adapter"


def load_vocabulary(folder: Path) -> dict:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def save(model, tokenizer, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)


def mutate_(generator: random.Random, file: Path) -> None:
    """Change a file in one or several places."""
    if not file.exists():  # GPT has no configuration of transformers' generation
        file.write_text('{"eos_token_id": 0}')
    if generator.random() < 0.15:
        file.write_bytes(mutate_bytes(generator, file.read_bytes()))
        return
    values = json.loads(file.read_text())
    for _ in range(generator.choice([1, 1, 2, 5])):
        if generator.random() < 0.5:
            values[generator.choice([*values])] = generator.choice(HOSTILE)
        else:
            values = mutate_tree(generator, values)
        if not isinstance(values, dict) or not values:
            break
    file.write_text(json.dumps(values))


def check(folder: Path) -> str:
    """Load a folder and reply with it: "loaded" or "refused". AssertionError where it ended in anything else."""
    try:
        model, tokenizer = load_finetuned(str(folder), force=True)
        (reply,) = generate(model, [Context([[7, 8]], [[9]])], tokenizer, Decoding(max_length=4))
        assert all(type(token) is int for token in reply)
        tokenizer.decode(reply)
    except UserError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 1500, f"not one line: {str(error)[:300]!r}"
        return "refused"
    return "loaded"


def check_in_a_process(folder: Path) -> tuple[str, float, int]:
    """What `check` says, and the processor's seconds and bytes of memory that it took; a traceback where it failed."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        before = memory()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds_so_far() + MAX_SECONDS + 1, resource.RLIM_INFINITY))
        signal.alarm(20 * MAX_SECONDS)  # where it waits for something
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            try:
                end = check(folder)
            except BaseException:
                end = traceback.format_exc()
        os.write(writer, f"{memory() - before} {end}".encode(errors="replace")[:60_000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        told = pipe.read().decode()
    _, status, used = os.wait4(process, 0)
    seconds = used.ru_utime + used.ru_stime
    if not told:
        return f"it was killed by {signal.Signals(os.WTERMSIG(status)).name}", seconds, 0
    grown, _, end = told.partition(" ")
    return end, seconds, int(grown)


def memory() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds_so_far() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int(used.ru_utime + used.ru_stime)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first one, to see one again")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    failed, ends, slowest, largest, began = 0, Counter(), 0.0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        checkpoints = list(make_checkpoints(top))
        for number in range(args.first, args.first + args.mutants):
            generator = random.Random(f"{args.seed} {number}")
            kind, origin = checkpoints[number % len(checkpoints)]
            folder = shutil.copytree(origin, top / "mutant")
            file = generator.choice(FILES[kind])
            mutate_(generator, folder / file)
            end, seconds, grown = check_in_a_process(folder)
            if end in ("loaded", "refused") and (seconds > MAX_SECONDS or grown > MAX_BYTES):
                end = f"{end} after {seconds:.1f} s, {grown / 1e6:.0f} MB"
            if end in ("loaded", "refused"):
                ends[f"{kind} {end}"] += 1
            else:
                failed += 1
                print(f"FAILED --first {number}: {origin.name}/{file}: {end}", flush=True)
            slowest, largest = max(slowest, seconds), max(largest, grown)
            shutil.rmtree(folder)
    logging.disable(logging.NOTSET)
    print(
        f"{args.mutants - failed} of {args.mutants} end well in {time.perf_counter() - began:.0f} s: {dict(ends)};"
        f" slowest {slowest:.2f} s, memory + {largest / 1e6:.0f} MB"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

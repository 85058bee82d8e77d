"""Preparing the data: cold, from a cache, and how the cost grows.

Each measurement is a process of its own, for its peak memory, so nothing is warm in it but the disk's cache.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import TextIO

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import reference
from benchmarks.measure import check_equal, figure, in_child, ratio
from benchmarks.setting import Setting, dialog_tokenizer, training_args
from train import get_data_loaders
from transfertransfo.data.dataset import get_dataset
from transfertransfo.data.inputs import MODEL_INPUTS, context_length


def ours_cold(path: str, tokenizer_path: str, cache: str) -> Callable:
    dataset = get_dataset(dialog_tokenizer(tokenizer_path), path, cache)
    return lambda: digest(dataset)


def reference_cold(path: str, tokenizer_path: str, cache: str) -> Callable:
    dataset = reference.read_dataset(dialog_tokenizer(tokenizer_path), path, cache)
    return lambda: digest(dataset)


def digest(dataset: dict) -> str:
    return hashlib.sha256(json.dumps(dataset, sort_keys=True).encode()).hexdigest()


def ours_warm(path: str, tokenizer_path: str, cache: str) -> Callable:
    """From the cache to the first batch; the result tells the sequences and their tokens."""
    loaders: tuple = get_data_loaders(training_args(path, cache), dialog_tokenizer(tokenizer_path))[:2]
    next(iter(loaders[0]))

    def finish() -> list[tuple[int, int]]:
        lengths = [
            [context_length(example.persona, example.history) + len(candidate) + 1
             for example in itertools.chain(*loader.dataset) for candidate in example.candidates]
            for loader in loaders if loader
        ]  # fmt: skip
        return [(len(row), sum(row)) for row in lengths]

    return finish


def reference_warm(path: str, tokenizer_path: str, cache: str) -> Callable:
    tokenizer, args = dialog_tokenizer(tokenizer_path), training_args(path, cache)
    dataset = torch.load(cache, weights_only=False)
    splits = []
    for split, dialogs in dataset.items():
        num_candidates = args.num_candidates if split == "train" else 0
        splits.append(reference.padded_tensors(dialogs, tokenizer, args, num_candidates))
    loader = DataLoader(
        TensorDataset(*(splits[0][name] for name in MODEL_INPUTS)), batch_size=args.train_batch_size, shuffle=True
    )
    next(iter(loader))
    return lambda: [(tensors["mc_token_ids"].numel(), int((tensors["mc_token_ids"] + 1).sum())) for tensors in splits]


def data(setting: Setting) -> Iterator[dict]:
    """Both sides cold, each with a cache file of its own; then from these files warm."""
    caches = [(str(setting.folder / f"ours{i}.bin"), str(setting.folder / f"reference{i}.bin"))
              for i in range(setting.sizes.repetitions)]  # fmt: skip
    for kind, sides, goals in (
        ("cold", (ours_cold, reference_cold), (">= 8", "<= 4", "<= 500")),
        ("warm", (ours_warm, reference_warm), (">= 20", "<= 1", "")),
    ):
        runs = [
            [in_child(side, setting.path, setting.tokenizer_path, cache) for side, cache in zip(sides, pair)]
            for pair in caches
        ]
        for own, other in runs:
            check_equal(f"data, {kind}", own[2], other[2])
        (times, peaks, _), (other_times, other_peaks, _) = (zip(*side) for side in zip(*runs))
        row = ratio(f"data, {kind}", times, other_times, goals[0], reference_peak_mb=max(other_peaks))
        yield row
        yield figure(f"data, {kind}: seconds", row["ours_s"], goals[1], "s")
        yield figure(f"data, {kind}: peak memory", max(peaks), goals[2], "MB")


def training_start(path: str, tokenizer_path: str, cache: str) -> Callable:
    """All that a trainer does before its first step, with the order of the whole epoch; gives the packed tokens."""
    loader, _, *samplers = get_data_loaders(training_args(path, cache), dialog_tokenizer(tokenizer_path))
    next(iter(loader))
    return lambda: sum(int(sampler.lengths.sum()) for sampler in samplers if sampler)


def scaling(setting: Setting) -> Iterator[dict]:
    """The dataset repeated; a trainer's start without a cache, which needs the most, and with one."""
    with open(setting.path) as file:
        dataset = json.load(file)
    path, cache = str(setting.folder / "repeated.json"), str(setting.folder / "repeated.bin")
    runs: dict[str, list[tuple]] = {"cold": [], "warm": []}
    for factor in setting.sizes.factors:
        with open(path, "w") as file:
            write_repeated(dataset, factor, file)
        for kind in runs:
            runs[kind].append(in_child(training_start, path, setting.tokenizer_path, cache))
    os.unlink(path)
    for kind, results in runs.items():
        times, peaks, tokens = zip(*results)
        seconds = [time.wall for time in times]
        per_token = [1e6 * second / count for second, count in zip(seconds, tokens)]
        more = {"factors": setting.sizes.factors, "seconds": seconds, "peak_mb": peaks, "tokens": tokens}
        growth = (peaks[-1] - peaks[0]) * 1e6 / (tokens[-1] - tokens[0])
        yield figure(f"data, {kind}, {setting.sizes.factors[-1]}x: memory", growth, "<= 100", "bytes/token", **more)
        yield figure(f"data, {kind}: time a token, largest over 1x", per_token[-1] / per_token[0], "<= 1.2", "ratio")


def write_repeated(dataset: dict, factor: int, file: TextIO) -> None:
    """The dialogs of each split `factor` times, written dialog by dialog: the whole would be large."""
    for before, (split, dialogs) in zip(itertools.chain("{", itertools.repeat(",")), dataset.items()):
        texts = [json.dumps(dialog) for dialog in dialogs]
        file.write(f"{before}{json.dumps(split)}: [")
        file.writelines(",\n" * bool(i) + text for i, text in enumerate(texts * factor))
        file.write("]")
    file.write("}")

"""How a claim is measured: both sides in turn, their answers compared first, the warm-up dropped, medians, a figure."""

import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


def figure(benchmark: str, value: float, goal: str = "", unit: str = "ratio", **more: Any) -> dict:
    """One measured number. `goal` is "" or as ">= 10"; `more` is what the number was made of."""
    met = None
    if goal:
        relation, bound = goal.split()
        met = value >= float(bound) if relation == ">=" else value <= float(bound)
    return {"benchmark": benchmark, unit: value, "goal": goal, "met": met} | more


class Seconds(NamedTuple):
    """What one run of a side took: by the clock, and of all cores together, which other programs disturb less."""

    wall: float
    cpu: float


@contextlib.contextmanager
def timed(times: list[Seconds], synchronize: Callable = lambda: None) -> Iterator[None]:
    """Append what the block took; `synchronize` waits for the device."""
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    synchronize()
    times.append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))


def ratio(benchmark: str, ours: Sequence[Seconds], reference: Sequence[Seconds], goal: str = "", **more: Any) -> dict:
    """Ratio of the medians of both sides' times, with both, and the lowest and highest ratio of one repetition."""
    (own, own_cpu), (other, other_cpu) = (map(statistics.median, zip(*side)) for side in (ours, reference))
    pairs = [b.wall / a.wall for a, b in zip(ours, reference)]
    return figure(
        benchmark, other / own, goal, ours_s=own, reference_s=other, lowest=min(pairs), highest=max(pairs),
        repetitions=len(pairs), cpu_ratio=other_cpu / own_cpu, **more,
    )  # fmt: skip


def in_turn(
    sides: Sequence[Callable], inputs: Iterable, same: Callable | None = None, synchronize: Callable = lambda: None
) -> list[list[Seconds]]:
    """What each side takes for each of the inputs, side after side on the same input; the first input is warm-up.

    Args:
        same: called with the results of all sides on one input; raises where they differ.
        synchronize: waits for the device.
    """
    times: list[list[Seconds]] = [[] for _ in sides]
    for item in inputs:
        results = []
        for side, own_times in zip(sides, times):
            with timed(own_times, synchronize):
                results.append(side(item))
        if same:
            same(*results)
    return [own_times[1:] for own_times in times]


class Difference(Exception):
    """Both sides do not give the same answer, so their times compare nothing."""


def check_equal(what: str, ours: object, reference: object) -> None:
    if ours != reference:
        raise Difference(f"{what}: the sides differ: {str(ours)[:200]} and {str(reference)[:200]}")


def check_close(what: str, ours: float, reference: float, tolerance: float) -> None:
    """Raise where two numbers differ by more than `tolerance`, relative to the larger or to 1."""
    if not abs(ours - reference) <= tolerance * max(1.0, abs(ours), abs(reference)):
        raise Difference(f"{what}: the sides differ: {ours} and {reference}")


def in_child(function: Callable, *args: object) -> tuple[Seconds, float, Any]:
    """Time and peak memory (MB) of `function(*args)` in a process of its own, and its result.

    The time begins after the imports. The process itself and what it imports are part of the peak.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed in its process") from None
    finally:
        process.join()


def _child(sender: Connection, function: Callable, args: tuple) -> None:
    times: list[Seconds] = []
    with timed(times):
        finish = function(*args)
    sender.send((times[0], peak_memory(), finish()))


def peak_memory() -> float:
    """The most memory that this process has had, in MB: Linux's VmHWM, since getrusage's starts with the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6  # it is given in KiB
    raise RuntimeError("no VmHWM in /proc/self/status: peak memory is measured on Linux only")


def format_row(row: dict) -> str:
    unit = next(key for key in row if key not in ("benchmark", "goal", "met"))
    sides = (
        f"{row['reference_s']:9.3f} s {row['ours_s']:9.3f} s  {row['lowest']:.1f} to {row['highest']:.1f}"
        if "ours_s" in row
        else ""
    )
    met = {None: "", True: "met", False: "MISSED"}[row["met"]]
    return f"{row['benchmark']:<46} {row[unit]:8.2f} {unit:<7} {row['goal']:>8} {met:<6} {sides}".rstrip()


def json_line(row: dict) -> str:
    return json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})

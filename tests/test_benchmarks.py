"""The benchmarks run end to end, with tiny sizes; both sides give the same answers; a side that does not is caught."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import ROOT, slow_but

from benchmarks import bench_data, bench_evaluation, gpu, reference, run
from benchmarks.measure import Difference, Seconds, check_close, figure, in_child, in_turn, ratio
from benchmarks.setting import QUICK, Setting, Shape

losses, conversation_tensors = reference.losses, reference.conversation_tensors
TINY = QUICK._replace(shape=Shape(1, 16, 2, 8192), small=Shape(1, 16, 2, 8192), turns=2, longest=0)


@pytest.fixture
def setting(tmp_path, example_json) -> Setting:
    path = tmp_path / "dialogs.json"
    path.write_text(json.dumps({split: dialogs[:3] for split, dialogs in example_json.items()}))
    return Setting(str(path), str(ROOT / "example" / "model"), tmp_path, TINY)


IN_ONE_PROCESS = [name for name in run.BENCHMARKS if name not in ("data", "scaling", "distributed", "dialogs-memory")]


@pytest.mark.parametrize("name", slow_but(["training", "f1"], IN_ONE_PROCESS))
def test_sides_agree(name, setting):
    for row in run.BENCHMARKS[name](setting):
        value = next(value for key, value in row.items() if key not in ("benchmark", "goal", "met"))
        assert value > 0


@pytest.mark.parametrize(("ours", "theirs"), [
    (bench_data.ours_cold, bench_data.reference_cold), (bench_data.ours_warm, bench_data.reference_warm),
])  # fmt: skip
def test_sides_agree_on_the_data(ours, theirs, setting, tmp_path):
    for side, name in ((bench_data.ours_cold, "ours"), (bench_data.reference_cold, "theirs")):
        side(setting.path, setting.tokenizer_path, str(tmp_path / name))
    results = [
        side(setting.path, setting.tokenizer_path, str(tmp_path / name))()
        for side, name in ((ours, "ours"), (theirs, "theirs"))
    ]
    assert results[0] == results[1]


def test_repeated_dataset_is_the_dialogs_again(setting, tmp_path):
    dataset = json.loads(Path(setting.path).read_text())
    with open(tmp_path / "repeated.json", "w") as file:
        bench_data.write_repeated(dataset, 3, file)
    repeated = json.loads((tmp_path / "repeated.json").read_text())
    assert repeated == {split: dialogs * 3 for split, dialogs in dataset.items()}


def shifted(*arguments) -> dict[str, torch.Tensor]:
    batch = conversation_tensors(*arguments)
    return batch | {"labels": batch["labels"].roll(1, -1)}


@pytest.mark.parametrize(("name", "function", "wrong"), [
    ("hits@1", "rank_candidates", lambda *_: list(range(20))),
    ("f1", "greedy_reply", lambda *_: [7] * 20),
    ("chat", "greedy_reply", lambda *_: [7] * 20),
    ("ppl", "next_token_logits", lambda *_: torch.zeros(8192)),
    ("dialogs", "conversation_tensors", lambda *arguments: shifted(*arguments)),
    ("training", "losses", lambda plain, batch: losses(plain, batch | {"lm_labels": batch["lm_labels"].roll(1, -1)})),
])  # fmt: skip
def test_a_side_that_differs_is_caught(name, function, wrong, setting, monkeypatch):
    monkeypatch.setattr(reference, function, wrong)
    with pytest.raises(Difference, match="the sides differ"):
        list(run.BENCHMARKS[name](setting))


def test_replies_do_not_end_by_themselves(setting):
    """A random model that gives `<speaker1>` at once made a benchmark of replies without a token."""
    lm = reference.lm_head(reference.double_heads(setting.model))
    reply = reference.greedy_reply(lm, setting.tokenizer, setting.turns[0].example, bench_evaluation.DECODING)
    assert len(reply) == bench_evaluation.DECODING.max_length


def test_first_input_is_warm_up_and_every_answer_is_compared():
    calls, compared = [], []
    sides = [lambda x: calls.append(("ours", x)) or x, lambda x: calls.append(("theirs", x)) or -x]
    times = in_turn(sides, [1, 2, 3], lambda *results: compared.append(results))
    assert calls == [(side, x) for x in (1, 2, 3) for side in ("ours", "theirs")]
    assert compared == [(1, -1), (2, -2), (3, -3)]
    assert [len(side) for side in times] == [2, 2]


def test_ratio_is_that_of_the_medians():
    ours = [Seconds(wall, 2.0) for wall in (1.0, 2.0, 9.0)]
    row = ratio("x", ours, [Seconds(wall, 8.0) for wall in (20.0, 10.0, 30.0)])
    assert (row["ratio"], row["ours_s"], row["reference_s"]) == (10.0, 2.0, 20.0)
    assert (row["lowest"], row["highest"], row["cpu_ratio"]) == (30 / 9, 20.0, 4.0)


def test_goals():
    assert figure("x", 9.0, ">= 10")["met"] is False and figure("x", 9.0, "<= 10")["met"] is True
    assert figure("x", 9.0)["met"] is None
    check_close("x", 100.0, 100.1, 2e-3)
    for other in (101.0, float("nan")):
        with pytest.raises(Difference):
            check_close("x", 100.0, other, 2e-3)


@pytest.mark.slow
def test_peak_memory_is_the_childs_own():
    """getrusage of a child begins with what its parent had, which made every side's peak that of the largest."""
    kept = written(1200)
    _, peak, (size, resident) = in_child(allocate, 300)
    assert size == 300 < peak and abs(peak - resident) < 400, "the parent has 900 MB more than the child"
    del kept


def allocate(megabytes: int):
    content = written(megabytes)
    return lambda: (len(content) // 1_000_000, resident_memory())


def written(megabytes: int) -> bytearray:
    """So much memory, each page written to: else it is no memory yet."""
    content = bytearray(megabytes * 1_000_000)
    content[::4096] = b"x" * len(content[::4096])
    return content


def resident_memory() -> float:
    """The memory that this process has now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_unknown_name_is_one_line():
    with pytest.raises(run.UserError, match="trainin: no such benchmark; known: data"):
        run.main(["trainin"])


def test_quick_run_prints_a_json_line_for_each_figure(capsys, monkeypatch):
    monkeypatch.setattr(run, "QUICK", TINY)
    figures = run.main(["--quick", "--threads", "1", "ppl-small", "candidates"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"benchmark"')]
    assert [line["benchmark"] for line in lines] == [row["benchmark"] for row in figures]
    assert lines[0]["benchmark"] == "word ppl, small model" and lines[0]["goal"] == ">= 50" and lines[0]["ratio"] > 0


@pytest.mark.slow
def test_data_in_processes_of_their_own(setting):
    names = [row["benchmark"] for row in run.BENCHMARKS["data"](setting)]
    assert names[0] == "data, cold" and "data, warm: peak memory" in names


@pytest.mark.slow
def test_dry_run_of_the_gpu_benchmarks(monkeypatch):
    monkeypatch.setattr(gpu.torch, "compile", lambda model, dynamic: model)  # takes a minute
    monkeypatch.setattr(gpu, "SMALL", TINY.shape)
    measure = gpu.examples_per_second  # of three such runs, the one in shards does
    monkeypatch.setattr(
        gpu,
        "examples_per_second",
        lambda launcher, flags, *rest: measure(launcher, flags, *rest) if "--sharded" in flags else 1.0,
    )
    names = {row["benchmark"] for row in gpu.main(["--dry-run"])}
    assert {"correctness, float32: largest difference of a loss", "correctness, bf16: largest difference of a loss",
            "training, bf16: loss over O0's after 10 steps, less 1",
            "evaluation, 2 processes over one: time", "training, 2 processes with shards, over one",
            "training, bf16", "the three figures of the valid split",
            "one epoch of the paper's recipe, bf16, extrapolated"} <= names  # fmt: skip

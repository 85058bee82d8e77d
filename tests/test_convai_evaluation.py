"""The evaluation as a script, its agent's state, and what it hands to ParlAI. What needs ParlAI is in test_parlai."""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import stat
import statistics
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import EVERY_FAMILY, FAMILIES, ROOT, run_processes, slow_but

import convai_evaluation
from convai_evaluation import TransformerAgent, parse_args, run
from transfertransfo.data.dataset import load_dataset
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.parlai import write_parlai
from transfertransfo.errors import UserError
from transfertransfo.evaluation import evaluator as evaluation
from transfertransfo.evaluation import native, parlai_agent, parlai_backend
from transfertransfo.evaluation.metrics import (
    distinct_n,
    f1,
    hit,
    mean_error,
    normalize,
    perplexity,
    perplexity_error,
    write_word_counts,
)
from transfertransfo.evaluation.parlai_backend import install_command, make_data_folder, recorder

FLAGS = ["--device", "cpu", "--no_sample", "--max_length", "6"]


@pytest.fixture
def dataset(example_json, tmp_path) -> Path:
    """A dataset of 4 dialogs to count words in and 2 to evaluate."""
    path = tmp_path / "dialogs.json"
    path.write_text(json.dumps({"train": example_json["train"][:4], "valid": example_json["valid"][:2]}))
    return path


@pytest.fixture(params=slow_but(["gpt2"], FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture
def evaluate(checkpoint, dataset, tmp_path):
    """Run the script; returns its report, the one it wrote, and the details."""

    def evaluate(*argv, path: Path = dataset) -> tuple[dict, dict, list[dict]]:
        report, details = tmp_path / "report.json", tmp_path / "details.jsonl"
        data = [] if "--datapath" in argv else ["--dataset_path", str(path)]
        returned = run(
            [
                "--model_checkpoint",
                str(checkpoint),
                *data,
                "--dataset_cache",
                "",
                "--report",
                str(report),
                "--details",
                str(details),
                *FLAGS,
                *map(str, argv),
            ]
        )
        return returned, json.loads(report.read_text()), [json.loads(line) for line in details.open()]

    return evaluate


@pytest.fixture
def parlai_data(dataset, tmp_path) -> Path:
    """A data folder as ParlAI leaves it, of the same dataset."""
    folder = tmp_path / "data"
    (folder / "ConvAI2").mkdir(parents=True)
    for split, dialogs in read_dialogs([dataset]).items():
        write_parlai(dialogs, folder / "ConvAI2" / f"{split}_self_original.txt")
    (folder / "ConvAI2" / ".built").write_text("today\nv5.0")
    return folder


# The script


def test_processes_measure_what_one_does(checkpoint, dataset, tmp_path, capsys):
    """Three share six batches of four; to the last digit, sampled replies too, each file written once."""
    flags = ["--model_checkpoint", checkpoint, "--dataset_path", dataset, "--dataset_cache", "", "--device", "cpu",
             "--eval_type", "all", "--max_length", 6, "--batchsize", 4]  # fmt: skip
    report, details = tmp_path / "report.json", tmp_path / "details.jsonl"
    flags += ["--report", report, "--details", details]
    run(list(map(str, flags)))
    one, printed = (report.read_bytes(), details.read_bytes()), capsys.readouterr().out
    assert run_processes(3, tmp_path / "three", run, flags) == [0, 0, 0]
    assert (report.read_bytes(), details.read_bytes()) == one
    said = [(tmp_path / "three" / f"log{rank}").read_text() for rank in range(3)]
    assert printed in said[0] and said[1:] == ["", ""]


def test_processes_draw_alike_without_a_seed(checkpoint, dataset, tmp_path):
    """In shards all of them go through each batch: replies of other lengths would leave one waiting for the other."""
    flags = ["--model_checkpoint", checkpoint, "--dataset_path", dataset, "--dataset_cache", "", "--device", "cpu",
             "--eval_type", "f1", "--max_length", 6, "--seed", 0, "--sharded"]  # fmt: skip

    def unseeded(argv: list[str]) -> None:
        torch.seed()  # as processes that a launcher starts
        (tmp_path / os.environ["RANK"]).write_text(str(run(argv)))

    assert run_processes(2, tmp_path / "two", unseeded, flags) == [0, 0]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() != str(None)


def test_other_backends_take_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--backend parlai: takes one process; start it without torchrun and --sh"):
        run(["--backend", "parlai"])


def test_figures_are_those_of_the_details(evaluate, dataset, capsys):
    report, written, details = evaluate("--eval_type", "all")
    utterances = [utterance for dialog in read_dialogs([dataset])["valid"] for utterance in dialog["utterances"]]
    labels = [utterance["candidates"][-1] for utterance in utterances]
    assert report.items() <= written.items()
    assert [row["index"] for row in details] == list(range(len(utterances)))
    hits = [hit(row["ranking"], x["candidates"], label) for row, x, label in zip(details, utterances, labels)]
    assert report["hits@1"] == sum(hits) / len(hits)
    assert [row["f1"] for row in details] == [f1(row["reply"], [label]) for row, label in zip(details, labels)]
    assert report["f1"] == sum(row["f1"] for row in details) / len(details)
    words = [p for row in details for _, p in row["words"]]
    scored = [p for p in words if p is not None]
    assert report["ppl"] == pytest.approx(math.exp(-math.fsum(map(math.log, scored)) / len(scored)))
    assert (report["scored_words"], report["unknown_words"]) == (len(scored), len(words) - len(scored))
    assert 0 < report["unknown_words"] < report["scored_words"]  # the gold replies of valid are not in the dictionary
    losses, tokens = zip(*(row["token_nll"] for row in details))
    assert report["token_ppl"] == pytest.approx(math.exp(sum(losses) / sum(tokens)))
    assert report["distinct-2"] == distinct_n([row["reply"].split() for row in details], 2)
    label_words = sum(len(normalize(label)) for label in labels) / len(labels)
    assert report["label_words"] == pytest.approx(label_words)
    counts = [len(utterance["candidates"]) for utterance in utterances]
    assert (report["fewest_candidates"], report["most_candidates"]) == (min(counts), max(counts))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"FINAL Hits@1: {report['hits@1']:.4g} (candidates: {min(counts)})",
        f"FINAL PPL: {report['ppl']:.4g} (words: {len(scored)} of {len(words)}, {len(scored) / len(words):.1%})",
        f"FINAL F1: {report['f1']:.4g} (words of a gold reply: {label_words:.1f})",
        f"Token PPL: {report['token_ppl']:.4g}",
    ]


@pytest.mark.parametrize("family", ["gpt2"])
def test_figures_that_mean_nothing_are_said_to(evaluate, dataset, capsys):
    """hits@1 with one candidate printed 1, and word ppl of a language without spaces came from 13 of 82 words."""
    texts = ["我喜欢喝茶。", "我有两只狗。", "我住在北京。", "我不吃蘑菇。"]
    utterances = [{"candidates": [reply], "history": ["你好！", texts[0]]} for reply in texts]
    dataset.write_text(json.dumps({"valid": [{"utterances": utterances}]}))
    report, _, _ = evaluate("--eval_type", "all")
    assert (report["hits@1"], report["sole_candidates"]) == (1, 4)
    assert (report["scored_words"], report["unknown_words"], report["label_words"]) == (1, 3, 1)
    out, log = capsys.readouterr()
    assert re.search(r"^FINAL Hits@1: 1 \(candidates: 1\)$", out, re.M)
    assert re.search(r"^FINAL PPL: \S+ \(words: 1 of 4, 25\.0%\)$", out, re.M)
    assert re.search(r"^FINAL F1: \S+ \(words of a gold reply: 1\.0\)$", out, re.M)
    for line in ("hits@1: 4 of 4 replies are the only candidate", "ppl: 3 of 4 words are not", "f1: compares words"):
        assert f"WARNING {line}" in log

    utterances[0]["candidates"].insert(0, "no .")
    dataset.write_text(json.dumps({"valid": [{"utterances": utterances}]}))
    evaluate()
    out, log = capsys.readouterr()
    assert "(candidates: 1 to 2)" in out and "hits@1: 3 of 4 replies are the only candidate" in log


def test_figures_that_mean_something_bring_no_warning(evaluate, capsys):
    evaluate("--eval_type", "all")
    assert not re.search("WARNING (hits@1|ppl|f1)", capsys.readouterr().err)


def test_a_report_says_of_what_it_is_and_how_sure(evaluate, dataset, checkpoint, capsys):
    report, written, details = evaluate("--eval_type", "all", "--seed", "7")
    assert (written["model"], written["dataset"], written["seed"]) == (str(checkpoint), str(dataset), 7)
    assert written["flags"]["max_length"] == 6 and written["versions"]["torch"] and written["examples"] == len(details)
    errors, n = written["standard_errors"], len(details)
    assert set(errors) == {"hits@1", "ppl", "f1", "token_ppl"}
    share = report["hits@1"]
    assert errors["hits@1"] == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
    mean = report["f1"]
    assert errors["f1"] == pytest.approx(math.sqrt(sum((row["f1"] - mean) ** 2 for row in details) / (n - 1) / n))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"Of {n} examples; standard errors: Hits@1 {errors['hits@1']:.2g}, PPL {errors['ppl']:.2g},")


def test_the_error_of_a_perplexity_is_that_of_another_draw():
    """Examples drawn anew have perplexities that differ by about as much."""
    draw = random.Random(1)
    examples = [(draw.gauss(3, 1) * n, n) for n in draw.choices(range(1, 20), k=400)]
    redrawn = [zip(*draw.choices(examples, k=400)) for _ in range(400)]
    found = [perplexity(sum(nlls), sum(counts)) for nlls, counts in redrawn]
    assert perplexity_error(*zip(*examples)) == pytest.approx(statistics.stdev(found), rel=0.15)
    assert math.isnan(perplexity_error([1.0], [1])) and math.isnan(mean_error([1.0]))
    assert math.isnan(perplexity_error([math.inf, 1.0], [1, 1]))


@pytest.mark.parametrize(("max_history", "turns"), [(1, slice(-3, None)), (-1, slice(None))])
def test_details_show_what_was_asked_and_answered(evaluate, dataset, max_history, turns):
    _, _, details = evaluate("--eval_type", "f1", "--max_history", max_history)
    dialogs = read_dialogs([dataset])["valid"]
    asked = [(dialog["personality"], utterance) for dialog in dialogs for utterance in dialog["utterances"]]
    for row, (persona, utterance) in zip(details, asked, strict=True):
        assert row["persona"] == persona and row["history"] == utterance["history"][turns]
        assert row["candidates"] == utterance["candidates"] and row["gold"] == utterance["candidates"][-1]
        assert row["reply"]


def test_the_batch_changes_nothing(evaluate):
    (*_, one), (*_, all_at_once) = (evaluate("--eval_type", "all", "--batchsize", size) for size in (1, 100))
    for row, other in zip(one, all_at_once, strict=True):
        assert (row["ranking"], row["reply"], row["f1"]) == (other["ranking"], other["reply"], other["f1"])
        assert [word for word, _ in row["words"]] == [word for word, _ in other["words"]]
        assert [p for _, p in row["words"]] == [p and pytest.approx(p, rel=1e-5) for _, p in other["words"]]


def test_no_forward_has_more_examples_than_asked(evaluate, monkeypatch):
    """Memory is that of one batch, however many examples there are."""
    sizes = []
    rank = evaluation.rank_candidates
    monkeypatch.setattr(evaluation, "rank_candidates", lambda *args: sizes.append(len(args[-1])) or rank(*args))
    _, report, _ = evaluate("--batchsize", 4)
    assert max(sizes) == 4 and sum(sizes) == report["examples"]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_bfloat16_changes_little(family, evaluate):
    plain, half = (evaluate("--eval_type", "ppl", *flags)[0] for flags in ([], ["--fp16", "bf16"]))
    assert half["token_ppl"] == pytest.approx(plain["token_ppl"], rel=0.05) and half["token_ppl"] != plain["token_ppl"]
    assert half["ppl"] == pytest.approx(plain["ppl"], rel=0.1)


@pytest.mark.parametrize(
    ("eval_type", "keys"),
    [("hits@1", {"hits@1", "fewest_candidates", "most_candidates", "sole_candidates"}),
     ("ppl", {"ppl", "token_ppl", "scored_words", "unknown_words"}),
     ("f1", {"f1", "label_words", "distinct-1", "distinct-2"} | {f"{whose}persona_{figure}" for whose in ("", "gold_")
             for figure in ("precision", "recall", "f1", "copies")})],
)  # fmt: skip
def test_only_what_is_asked_for_is_measured(evaluate, eval_type, keys):
    report, _, _ = evaluate("--eval_type", eval_type)
    assert set(report) == {"examples"} | keys


def test_the_model_talks_to_itself(evaluate, capsys):
    report, written, talks = evaluate("--eval_type", "selfchat", "--num_chats", 2, "--num_beams", 2, "--rank")
    assert report == {key: written[key] for key in report} and set(report) > set(written["people"])
    assert (report["talks"], report["replies"]) == (2, 32) and [len(talk["turns"]) for talk in talks] == [17, 17]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("2 talks, 32 replies") and len(said) == len(written["people"])
    with pytest.raises(UserError, match=r"^--eval_type selfchat: --backend native alone has it$"):
        evaluate("--eval_type", "selfchat", "--backend", "parlai")


def test_empty_replies_count_as_wrong(evaluate, monkeypatch):
    monkeypatch.setattr(evaluation, "generate", lambda model, contexts, *_: [[] for _ in contexts])
    report, _, details = evaluate("--eval_type", "f1")
    assert {row["reply"] for row in details} == {""}
    assert (report["f1"], report["distinct-1"], report["distinct-2"]) == (0, 0, 0)


def test_one_candidate_is_a_hit_and_its_twin_too(evaluate, dataset):
    """A hit compares texts: of two that read the same, either will do."""
    utterances = [{"candidates": ["Yes, I do!", "yes i do ."], "history": ["do you ?"]}]
    dataset.write_text(json.dumps({"valid": [{"personality": [], "utterances": utterances}]}))
    assert evaluate()[0]["hits@1"] == 1
    del utterances[0]["candidates"][0]
    dataset.write_text(json.dumps({"valid": [{"personality": [], "utterances": utterances}]}))
    report, _, details = evaluate()
    assert report["hits@1"] == 1 and details[0]["ranking"] == [0]


def test_a_dictionary_without_the_words_gives_no_perplexity(evaluate, tmp_path, capsys):
    write_word_counts(tmp_path / "dict", {"xyzzy": 1})
    evaluate("--eval_type", "hits@1", "--dict_file", tmp_path / "dict")
    assert "WARNING --dict_file: has no effect on --eval_type hits@1\n" in capsys.readouterr().err
    report, written, details = evaluate("--eval_type", "ppl", "--dict_file", tmp_path / "dict")
    assert math.isnan(report["ppl"]) and report["scored_words"] == 0
    assert written["ppl"] is None, "NaN is no JSON"
    assert all(p is None for row in details for _, p in row["words"])


def test_parlais_data_folder_serves_without_parlai(evaluate, parlai_data):
    (from_json, _, rows), (from_folder, _, same_rows) = evaluate("--eval_type", "all"), evaluate(
        "--eval_type", "all", "--datapath", parlai_data)  # fmt: skip
    assert (from_json, rows) == (from_folder, same_rows)
    (parlai_data / "models" / "convai2").mkdir(parents=True)
    write_word_counts(parlai_data / "models" / "convai2" / "dict_self", {"i": 5, ".": 9})
    from_dictionary, _, _ = evaluate("--eval_type", "all", "--datapath", parlai_data)
    assert from_dictionary["scored_words"] < from_json["scored_words"]
    assert from_dictionary["f1"] == from_json["f1"]


@pytest.mark.parametrize("family", ["gpt2"])
def test_gpt2s_original_words_differ(evaluate):
    spaced, original = (evaluate("--eval_type", "ppl", "--gpt2_ppl", way)[0] for way in ("spaced", "original"))
    assert spaced["ppl"] != original["ppl"] and spaced["token_ppl"] == original["token_ppl"]


@pytest.mark.parametrize("family", ["gpt"])
def test_input_that_cannot_be_used(evaluate, dataset, tmp_path):
    (tmp_path / "dict").write_text("word 1\n")
    for argv, message in (
        (["--dict_file", "nowhere"], "--dict_file nowhere: no such file"),
        (["--dict_file", tmp_path / "dict"], f"--dict_file {tmp_path}/dict: line 1 is not a word, a tab and its count"),
        (["--datapath", tmp_path / "none"], f"{tmp_path}/none/ConvAI2: no such file or folder"),
        (["--eval_type", "f1", "--dict_file", "nowhere"], "--dict_file nowhere: no such file"),
    ):
        with pytest.raises(UserError) as error:
            evaluate("--eval_type", "ppl", *argv)
        assert str(error.value) == message
    dataset.write_text(json.dumps({"train": json.loads(dataset.read_text())["train"]}))
    with pytest.raises(UserError, match="no valid split to evaluate on"):
        evaluate()


# What ParlAI is given


COUNTS = {"i": 3}.copy


def test_parlai_gets_a_copy_of_the_validation_split(dataset, tokenizer, tmp_path):
    data = tmp_path / "temporary"
    data.mkdir()
    make_data_folder(data, "convai2", load_dataset(tokenizer, dataset, ""), COUNTS)
    files = {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}
    names = ("valid_self_original.txt", "valid_self_original_no_cands.txt", ".built")
    assert files == {*(f"ConvAI2/{name}" for name in names), "models/convai2/dict_self"}
    assert (data / "ConvAI2" / ".built").read_text().split("\n")[1] == "v5.0"
    valid = read_dialogs([data / "ConvAI2" / names[0]])["valid"]
    assert valid == read_dialogs([dataset])["valid"]


def snapshot(folder: Path) -> dict:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parlai_never_sees_the_users_own_folder(parlai_data, tokenizer, tmp_path):
    """ParlAI deletes a folder whose mark it does not like. It gets a link, which cannot be deleted through."""
    own = parlai_data / "ConvAI2"
    data = tmp_path / "temporary"
    data.mkdir()
    before = snapshot(parlai_data)
    make_data_folder(data, "parlai", load_dataset(tokenizer, own, ""), COUNTS, own_data=own)
    assert (data / "ConvAI2").is_symlink()
    assert snapshot(parlai_data) == before


@pytest.mark.parametrize("mark", [None, "", "today", "today\nv4.0", "v5.0\n"])
def test_a_folder_that_parlai_would_delete_is_refused(evaluate, monkeypatch, parlai_data, mark):
    built = parlai_data / "ConvAI2" / ".built"
    built.unlink() if mark is None else built.write_text(mark)
    monkeypatch.setattr(parlai_backend, "check_installed", lambda backend: None)
    with pytest.raises(UserError) as error:
        evaluate("--backend", "parlai", "--datapath", parlai_data)
    assert str(error.value).startswith(f"{built}: its second line is not v5.0")
    assert str(error.value).endswith(f"; evaluate a copy of its data: --dataset_path {parlai_data / 'ConvAI2'}")
    assert "\n" not in str(error.value)


def test_a_file_that_parlai_would_miss_is_named(evaluate, monkeypatch, parlai_data):
    monkeypatch.setattr(parlai_backend, "check_installed", lambda backend: None)
    with pytest.raises(UserError, match=r"original_no_cands\.txt: not there; --dataset_path .* does without"):
        evaluate("--backend", "convai2", "--datapath", parlai_data)


@pytest.mark.parametrize("backend", ["parlai", "convai2"])
@pytest.mark.parametrize("installed", [None, "0.9"])
def test_a_backend_that_is_not_installed(evaluate, monkeypatch, backend, installed):
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError) as error:
        evaluate("--backend", backend)
    assert str(error.value).startswith(f"--backend {backend}: needs parlai==")
    assert str(error.value).endswith(install_command(backend))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["parlai", "convai2"])
def test_the_install_command_is_that_of_the_requirements(backend):
    """`make test-parlai` runs it from there."""
    lines = (ROOT / f"requirements/{backend}.txt").read_text().splitlines()
    assert [line.lstrip("# ") for line in lines if line.startswith("#   ")] == [install_command(backend)]


def test_the_temporary_folder_is_private_and_removed(evaluate, monkeypatch):
    found = {}

    def look(opt: dict, measures: tuple) -> dict:
        folder = Path(opt["datapath"])
        found.update(folder=folder, mode=stat.S_IMODE(folder.stat().st_mode))
        raise KeyboardInterrupt

    monkeypatch.setattr(parlai_backend, "check_installed", lambda backend: None)
    monkeypatch.setattr(parlai_backend, "run_parlai", look)
    with pytest.raises(KeyboardInterrupt):
        evaluate("--backend", "parlai")
    assert found["mode"] == 0o700
    assert not found["folder"].exists()


def test_results_find_their_rows_whatever_the_order():
    def dialog(said: str) -> dict:
        first = {"history": [said], "candidates": ["no .", "yes ."]}
        second = {"history": [said, "yes .", "and ?"], "candidates": ["x", "yes ."]}
        return {"personality": ["i like tea ."], "utterances": [first, second]}

    dialogs = [dialog("hi !"), dialog("ho !"), dialog("hi !")]
    details = [{} for _ in range(6)]
    record = recorder(details, dialogs)
    for place, (k, i) in enumerate([(2, 0), (1, 0), (0, 0), (2, 1), (1, 1), (0, 1)]):
        utterance = dialogs[k]["utterances"][i]
        heard = Namespace(persona=["i like tea . "], history=utterance["history"], label="yes .")
        record(heard, {"reply": f"{place}"})
    assert [row["reply"] for row in details] == ["0", "3", "1", "4", "2", "5"]
    assert all(row["f1"] == 0 for row in details)
    with pytest.raises(UserError, match=r"has a reply more than here: 'yes \.'"):
        record(heard, {})


# The agent, as far as it works without ParlAI


@pytest.fixture
def make_agent(checkpoint):
    def make_agent(**opt) -> TransformerAgent:
        return TransformerAgent({"model_checkpoint": str(checkpoint), "device": "cpu", "no_sample": True, **opt})

    return make_agent


MESSAGE = {"text": "your persona: i like tea .\nyour persona: i am old .\nhi !", "episode_done": False,
           "eval_labels": ("hello .",), "label_candidates": ["no .", "hello .", "tea ."]}  # fmt: skip
NEXT = {"text": "and then ?", "episode_done": True, "eval_labels": ("tea .",), "label_candidates": ["no .", "tea ."]}
PADDING = {"batch_padding": True, "episode_done": True}


def test_a_name_that_is_not_there():
    """The agent is had through the module's `__getattr__`, which must not swallow what it does not know."""
    with pytest.raises(AttributeError, match="has no attribute 'Transformer'"):
        convai_evaluation.Transformer  # noqa: B018


@pytest.mark.parametrize("family", ["gpt"])
def test_the_gold_reply_joins_the_history_and_an_episodes_end_clears_it(make_agent):
    agent = make_agent()
    first = agent.observe(MESSAGE)["dialog"]
    assert agent.act()["text_candidates"][0] in MESSAGE["label_candidates"]
    second = agent.observe(NEXT)["dialog"]
    third = agent.observe(NEXT)["dialog"]
    assert first == (["i like tea .", "i am old ."], ["hi !"], ["no .", "hello .", "tea ."], "hello .")
    assert second == (first.persona, ["hi !", "hello .", "and then ?"], ["no .", "tea ."], "tea .")
    assert third == ([], ["and then ?"], ["no .", "tea ."], "tea .")
    agent.reset()
    assert agent.observe({"text": "hi !"})["dialog"] == ([], ["hi !"], [], None)


@pytest.mark.parametrize("family", ["gpt"])
def test_in_a_chat_the_agents_own_reply_joins_the_history(make_agent):
    agent = make_agent(max_length=4)
    agent.observe({"text": "your persona: i like tea .", "episode_done": False})  # as ParlAI's interactive world does
    agent.observe({"text": "hi !\nhow are you ?", "label_candidates": None, "episode_done": False})
    said = agent.act()["text"]
    assert said
    dialog = agent.observe({"text": "and you ?", "episode_done": False})["dialog"]
    assert dialog == (["i like tea ."], ["hi !", "how are you ?", said, "and you ?"], [], None)
    assert agent.observe({"episode_done": True}) and agent.act() == {"id": "TransformerAgent"}


@pytest.mark.parametrize("family", ["gpt"])
def test_a_task_that_the_tokenizer_cannot_write_is_told_once_or_refused(make_agent, example_json, monkeypatch, caplog):
    """ParlAI's own commands show the agent a message at a time, and figures of `<unk>` look like any others."""
    monkeypatch.setattr(parlai_agent, "ENOUGH", 40)

    def hear(texts: list[str]) -> list[str]:
        agent = make_agent(eval_type="hits@1")
        copies = [TransformerAgent(agent.opt, agent.share()) for _ in range(2)]
        for copy, text in zip(itertools.cycle(copies), texts):
            copy.observe({"text": text, "label_candidates": ["no .", "tea ."]})
            copy.act()
        return [record.message for record in caplog.records]

    english = [turn["history"][-1] for turn in example_json["train"][0]["utterances"]]
    assert not [line for line in hear(english) if "unknown" in line]
    (told,) = [line for line in hear(["안녕하세요", *english]) if "unknown" in line]
    assert re.match(r"the task's text: \d+\.\d% of its tokens are unknown to .* '안녕하세요'; .*gpt2", told)
    with pytest.raises(UserError, match=r"the task's text: 8.*unknown"):
        hear([" ".join("안녕하세요여러분"[:n]) for n in range(2, 9)] * 2 + [f"안{n} 녕" for n in range(20)])


@pytest.mark.parametrize("eval_type", ["hits@1", "f1"])
def test_copies_in_a_batch_answer_as_one_agent_alone(make_agent, eval_type):
    """ParlAI calls `batch_act` on an agent that has heard nothing of the dialogs."""
    root = make_agent(eval_type=eval_type, max_length=4)
    copies = [TransformerAgent(root.opt, root.share()) for _ in range(3)]
    observed = [agent.observe(message) for agent, message in zip(copies, (MESSAGE, PADDING, NEXT))]
    acts = root.batch_act(observed)
    assert acts[1] == {"id": "TransformerAgent"}
    for message, act in ((MESSAGE, acts[0]), (NEXT, acts[2])):
        alone = make_agent(eval_type=eval_type, max_length=4)
        alone.observe(message)
        assert alone.act() == act
    assert copies[0].evaluator is root.evaluator
    observed = [agent.observe(NEXT) for agent in copies]
    assert [len(observation["dialog"].history) for observation in observed] == [3, 1, 1]


@pytest.mark.parametrize("family", ["gpt"])
def test_a_label_that_is_no_candidate_is_a_miss(make_agent):
    agent = make_agent()
    agent.observe({**MESSAGE, "eval_labels": ("something else .",)})
    assert sorted(agent.act()["text_candidates"]) == sorted(MESSAGE["label_candidates"])


@pytest.mark.parametrize("family", ["gpt"])
def test_the_agents_dictionary(make_agent, parlai_data, tmp_path):
    """Without --dict_file it has the words of the data in ParlAI's folder, as the archived scripts count them."""
    counted = make_agent(eval_type="ppl", datapath=str(parlai_data))
    counted.observe(MESSAGE)
    probabilities = counted.next_word_probability(["hello"])
    assert sum(probabilities.values()) == pytest.approx(1)
    assert {"__unk__", "persona", "i"} < set(probabilities)
    write_word_counts(tmp_path / "dict", {"hello": 2, ".": 1})
    given = make_agent(eval_type="ppl", datapath=str(parlai_data), dict_file=str(tmp_path / "dict"))
    given.observe(MESSAGE)
    assert set(given.next_word_probability([])) == {"hello", "."}
    with pytest.raises(UserError, match="--eval_type hits@1: probabilities of words need ppl or all"):
        make_agent().next_word_probability([])


def test_the_agents_flags_are_the_scripts_and_leave_parlais_alone():
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    parser.add_argument("-m", "--model")
    assert TransformerAgent.add_cmdline_args(parser, partial_opt=None) is parser
    args = parser.parse_args(["--model", "convai_evaluation:TransformerAgent", "--temperature", "0.9"])
    assert (args.model, args.model_checkpoint, args.temperature) == ("convai_evaluation:TransformerAgent", "", 0.9)
    defaults = vars(parser.parse_args([]))
    del defaults["model"]
    assert defaults.items() <= vars(parse_args([])).items()


@pytest.mark.parametrize("flag", ["--report", "--details"])
def test_a_file_that_cannot_be_written_is_said_before_the_work(checkpoint, dataset, tmp_path, monkeypatch, flag):
    monkeypatch.setattr(native, "evaluate", lambda *_, **__: pytest.fail("evaluated first"))
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "nowhere" / "file", "No such file or directory"),
                         (Path("/proc/file"), "No such file or directory")):  # fmt: skip
        with pytest.raises(UserError) as error:
            convai_evaluation.run(["--model", str(checkpoint), "--dataset_path", str(dataset), flag, str(path)])
        assert str(error.value) == f"{flag} {path}: no file can be written there ({reason})"


def test_two_datasets_are_refused(tmp_path):
    """The one was silently taken."""
    with pytest.raises(UserError, match=r"^--datapath and --dataset_path: give one of the two$"):
        run(["--datapath", str(tmp_path), "--dataset_path", str(tmp_path)])


def test_one_file_for_both_is_refused(tmp_path, monkeypatch):
    """The details took the place of the report."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--report and --details: the same file$"):
        run(["--report", "file", "--details", str(tmp_path / "file")])


def test_the_details_are_written_where_the_report_cannot_be(tmp_path):
    """The disk may have become full since it was checked."""
    args = parse_args(["--report", str(tmp_path / "gone" / "file"), "--details", str(tmp_path / "details")])
    measured = convai_evaluation.Measured([{"index": 0}], {}, {}, [])
    with pytest.raises(UserError, match=r"^--report .*: No such file or directory$"):
        convai_evaluation.write_files(args, measured)
    assert json.loads((tmp_path / "details").read_text()) == {"index": 0}

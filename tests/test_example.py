"""What made the shipped models: the scripts in example/."""

import copy
import json
import re
import runpy
import shlex

import pytest
import torch
from helpers import ROOT, process_as_it_was

import train
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.personas import draw_persona
from transfertransfo.model.loading import load_model
from transfertransfo.model.sources import load_tokenizer


@pytest.fixture
def run_script(monkeypatch):
    def run(name: str, *args) -> None:
        monkeypatch.setattr("sys.argv", [name, *map(str, args)])
        runpy.run_path(str(ROOT / "example" / name), run_name="__main__")

    return run


def test_whole_dialogs_are_persona_and_turns_of_both(run_script, tmp_path):
    turns = [{"history": ["hi !"], "candidates": ["no .", "hello !"]},
             {"history": ["hi !", "hello !", "tea ?"], "candidates": ["no .", "yes ."]}]  # fmt: skip
    dialog = {"personality": ["i like tea .", "i run .", "i ski ."], "utterances": turns}
    (tmp_path / "d.json").write_text(json.dumps({"train": [dialog]}))
    run_script("whole_dialogs.py", tmp_path / "d.json", tmp_path / "whole.jsonl", "--permutations", 2)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"utterances": [{"history": [], "candidates": [".", f"{persona} hi ! hello ! tea ? yes ."]}]}
        for persona in ("i like tea . i run . i ski .", "i ski . i like tea . i run .")
    ]


def test_both_sides_turn_the_dialogs_around_that_are_not_held_out(run_script, tmp_path):
    def dialog(*turns: str) -> dict:
        utterances = [{"history": list(turns[:i]), "candidates": ["no .", turns[i]]} for i in range(1, len(turns), 2)]
        return {"personality": ["i like tea ."], "utterances": utterances}

    dialogs = [dialog("hi !", "hello !", "tea ?", "yes .", "me too .", "good ."), dialog("hi !", "bye !"),
               dialog("who ?", "me .", "oh .", "yes !")]  # fmt: skip
    (tmp_path / "d.json").write_text(json.dumps({"train": dialogs}))
    run_script("both_sides.py", tmp_path / "d.json", tmp_path / "both.json", "--valid_share", 0.3)
    turned = {"personality": [], "utterances": [
        {"history": ["hello !"], "candidates": ["tea ?"]},
        {"history": ["hello !", "tea ?", "yes ."], "candidates": ["me too ."]},
    ]}  # fmt: skip
    assert json.loads((tmp_path / "both.json").read_text()) == {"train": [turned, *dialogs[:2]], "valid": dialogs[2:]}


def test_both_sides_draw_no_distractors_from_what_they_hold_out(run_script, tmp_path):
    dialogs = [{"personality": [], "utterances": [{"history": [], "candidates": [f"reply {i}"]}]} for i in range(10)]
    (tmp_path / "d.json").write_text(json.dumps({"train": dialogs}))
    run_script("both_sides.py", tmp_path / "d.json", tmp_path / "both.json", "--valid_share", 0.3)
    assert json.loads((tmp_path / "both.json").read_text()) == {"train": dialogs[:7], "valid": dialogs[7:]}


def test_a_shipped_model_is_half_as_large_and_the_same(run_script, checkpoint, tmp_path):
    run_script("ship.py", checkpoint, tmp_path / "shipped")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (checkpoint, tmp_path / "shipped")]
    assert 0.45 < sizes[1] / sizes[0] < 0.55
    assert load_tokenizer(tmp_path / "shipped").get_vocab() == load_tokenizer(checkpoint).get_vocab()
    shipped = ROOT / "example" / "model", tmp_path / "shipped"
    assert len({(folder / "training_args.json").read_text() for folder in shipped}) == 1
    want, got = (dict(load_model(folder).named_parameters()) for folder in (checkpoint, tmp_path / "shipped"))
    assert all(torch.equal(got[name], parameter.half().float()) for name, parameter in want.items())


def test_checkpoints_beside_one_another(run_script, checkpoints, example_json, tmp_path, capsys):
    dialogs = copy.deepcopy(example_json["valid"][:2])
    dialogs[0]["utterances"][0]["candidates"][-1] = "a|b <i>c</i>"
    (tmp_path / "valid.json").write_text(json.dumps({"valid": dialogs}))
    both = [checkpoints["gpt"], checkpoints["gpt2"]]
    flags = ["--device", "cpu", "--max_length", 6, "--html", tmp_path / "x.html"]
    run_script("compare.py", *both, "--dataset_path", tmp_path / "valid.json", "--dataset_cache", "", *flags)
    figures, replies = (table.splitlines() for table in capsys.readouterr().out.split("\n\n"))
    assert [line.split(" | ")[0] for line in figures[2:]] == [f"| {folder}" for folder in both]
    assert figures[0] == "| checkpoint | examples | hits@1 | word ppl | F1 | token ppl | distinct-2 |"
    examples = sum(len(dialog["utterances"]) for dialog in dialogs)
    assert all(line.split(" | ")[1] == f"{examples}" and line.count(" ± ") == 4 for line in figures[2:])
    assert len(replies) == 2 + examples and f"{both[0]} | {both[1]} | the right reply" in replies[0]
    assert r"| a\|b &lt;i>c&lt;/i> |" in replies[2]
    page = (tmp_path / "x.html").read_text()
    assert page.count("<tr>") == len(figures) - 1 + len(replies) - 1 and "a|b &lt;i&gt;c&lt;/i&gt;" in page


def test_checkpoints_on_dialogs_that_are_held_out(run_script, checkpoints, example_json, tmp_path, capsys):
    dialogs = example_json["train"][:4]
    (tmp_path / "d.json").write_text(json.dumps({"train": dialogs}))
    flags = ["--dataset_path", tmp_path / "d.json", "--dataset_cache", "", "--device", "cpu", "--max_length", 2]
    run_script("compare.py", checkpoints["gpt2"], *flags, "--replies", 0, "--valid_share", 0.25)
    row = capsys.readouterr().out.splitlines()[2]
    assert row.split(" | ")[1] == str(len(dialogs[3]["utterances"]))
    with pytest.raises(SystemExit):
        run_script("compare.py", checkpoints["gpt2"], *flags)
    assert "no valid split to evaluate on" in (said := capsys.readouterr().err) and "--valid_share holds" in said


@pytest.mark.slow
def test_your_own_character(run_script, checkpoints, tmp_path, monkeypatch, capsys):
    """The steps of the README, fewer of them, on a tiny model: it learns, and is put beside what it was."""
    dialogs = read_dialogs([ROOT / "example" / "character.jsonl"])["train"]
    assert len(dialogs) == 20 and draw_persona([ROOT / "example" / "character.jsonl"]) == dialogs[0]["personality"]
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"python train\.py --model example/smollm2 ((?:.*\\\n)*.*)", readme)
    argv = shlex.split(command.replace("\\\n", " ").replace("example/", f"{ROOT}/example/"), comments=True)
    monkeypatch.chdir(tmp_path)
    with process_as_it_was():
        run = train.train([*argv, "--model", str(checkpoints["gpt2"]), "--n_epochs", "1", "--device", "cpu"])
    run_script("compare.py", checkpoints["gpt2"], run, "--questions", ROOT / "example" / "character_questions.txt",
               "--dataset_path", ROOT / "example" / "character.jsonl", "--device", "cpu")  # fmt: skip
    _, _, *rows = capsys.readouterr().out.splitlines()
    before, after = zip(*(row.split(" | ")[1:3] for row in rows))
    assert len(rows) == 10 and before != after


def test_answers_beside_one_another(run_script, checkpoints, tmp_path, capsys):
    (tmp_path / "q").write_text("hello !\nany pets ?\n")
    flags = ["--device", "cpu", "--max_length", 6, "--dataset_path", ROOT / "example" / "character.jsonl"]
    run_script("compare.py", checkpoints["gpt2"], checkpoints["gpt2"], "--questions", tmp_path / "q", *flags)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == f"| said | {checkpoints['gpt2']} | {checkpoints['gpt2']} |"
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [row[0] for row in cells] == ["hello !", "any pets ?"] and all(row[1] == row[2] != "" for row in cells)


def test_sentences_and_their_contraries(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "example")
    from contradictions import OF_NEGATIVE, OF_POSITIVE, contrary, make_cases

    for sentence, other in [
        ("i like tea .", "i hate tea ."), ("i am a nurse .", "i am not a nurse ."), ("i'm old .", "i am not old ."),
        ("i can sing .", "i cannot sing ."), ("i work at sea .", "i do not work at sea ."),
        ("my best friend is tall .", "my best friend is not tall ."), ("two dogs are mine .", None),
        ("i likewise agree .", None),
    ]:  # fmt: skip
        assert contrary(sentence, OF_POSITIVE) == other
    for sentence, other in [
        ("i do not eat meat .", "i eat meat ."), ("i hate tea .", "i love tea ."), ("i am not old .", "i am old ."),
        ("i can't sing .", "i can sing ."), ("my dog is not big .", "my dog is big ."), ("i sing .", None),
    ]:  # fmt: skip
        assert contrary(sentence, OF_NEGATIVE) == other
    dialogs = [{"personality": ["i am not old .", "i ski .", "i like tea ."]}, {"personality": ["i am not old ."]}]
    assert make_cases(dialogs) == {
        "positive": [(dialogs[0]["personality"], "i like tea .", "i hate tea .")],
        "negative": [(dialogs[0]["personality"], "i am not old .", "i am old .")],
    }


def test_the_heads_say_what_they_prefer(run_script, checkpoints, example_json, tmp_path, capsys):
    (tmp_path / "valid.json").write_text(json.dumps({"valid": example_json["valid"][:2]}))
    flags = ["--dataset_path", tmp_path / "valid.json", "--dataset_cache", "", "--device", "cpu"]
    run_script("contradictions.py", checkpoints["gpt"], *flags)
    _, positive, negative = map(str.split, capsys.readouterr().out.splitlines())
    assert positive[0] == "positive" and int(positive[1]) > 3 and all(0 <= float(share) <= 1 for share in positive[2:])
    assert negative[0] == "negative"


@pytest.mark.parametrize(("name", "args", "line"), [
    ("compare.py", ["a"], "compare.py: error: --questions or --dataset_path: give one of the two\n"),
    ("contradictions.py", ["a", "--count", "0"],
     "contradictions.py: error: argument --count: expected a whole number of at least 1, got '0'\n"),
    ("compare.py", ["a", "--questions", "q", "--html", "no/x.html"],
     "compare.py: error: --html no/x.html: no file can be written there (No such file or directory)\n"),
    ("ship.py", [".", "f"], "ship.py: error: .: no model.safetensors or adapter_model.safetensors there\n"),
    ("whole_dialogs.py", ["none.json", "f"], "whole_dialogs.py: error: none.json: no such file or folder\n"),
    ("both_sides.py", ["none.json", "f"], "both_sides.py: error: none.json: no such file or folder\n"),
    ("make_tokenizer.py", [], "make_tokenizer.py: error: the following arguments are required: dataset, folder\n"),
])  # fmt: skip
def test_bad_input_is_one_line(run_script, tmp_path, monkeypatch, capsys, name, args, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ending:
        run_script(name, *args)
    assert (ending.value.code, capsys.readouterr().err) == (2, line)

"""Datasets tokenised once and cached, tokenizers, checkpoints, run folders."""

import gc
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import shutil
import threading
from datetime import datetime

import pytest
from transformers import AutoTokenizer

from transfertransfo.data import dataset
from transfertransfo.data.dataset import get_dataset, load_dataset, tokenize
from transfertransfo.data.dialogs import read_dialogs
from transfertransfo.data.tokenization import ATTR_TO_SPECIAL_TOKEN
from transfertransfo.errors import UserError
from transfertransfo.model import sources
from transfertransfo.model.loading import load_model
from transfertransfo.model.sources import load_tokenizer, resolve_checkpoint
from transfertransfo.training import runs
from transfertransfo.training.runs import make_logdir
from utils import AttrDict

DATASET = {
    "train": [
        {
            "personality": ["i like tea .", "i have two dogs ."],
            "utterances": [
                {"candidates": ["no .", "why ?", "hello there !"], "history": ["hi , how are you ?"]},
                {"candidates": ["why ?", "yes ."], "history": ["hi , how are you ?", "hello there !", "i like tea ."]},
            ],
        },
        {"personality": [], "utterances": [{"candidates": ["hm", "no ."], "history": ["Ünïcode — “quotes” 😀"]}]},
    ],
    "valid": [
        {"personality": ["i like tea ."], "utterances": [{"candidates": ["no .", "yes ."], "history": ["why ?"]}]},
        {"personality": ["x"], "utterances": [{"candidates": ["a", "b"], "history": []}] * 2},
    ],
}


@pytest.fixture
def dataset_path(tmp_path):
    path = tmp_path / "data" / "dataset.json"
    path.parent.mkdir()
    path.write_text(json.dumps(DATASET))
    return path


@pytest.fixture
def stem(tmp_path):
    return tmp_path / "cache" / "stem.bin"


def by_hand(tokenizer, value):
    """Each text of a structure replaced by its token ids."""
    if isinstance(value, str):
        return tokenizer.encode(value, add_special_tokens=False)
    if isinstance(value, list):
        return [by_hand(tokenizer, item) for item in value]
    return {name: by_hand(tokenizer, item) for name, item in value.items()}


def warnings(caplog):
    """What was warned of, but that DATASET has a text which no vocabulary made here can write."""
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [line for line in lines if "unknown to the model's tokenizer" not in line]


def caches(stem):
    return sorted(stem.parent.iterdir()) if stem.parent.is_dir() else []


# get_dataset


def test_dataset_is_each_text_tokenised_in_its_place(tokenizer, dataset_path, stem):
    assert get_dataset(tokenizer, dataset_path, stem) == by_hand(tokenizer, DATASET)


def test_equal_sentences_share_one_list(gpt, dataset_path):
    dataset = get_dataset(gpt, dataset_path, "")
    first, second = dataset["train"][0]["utterances"]
    assert first["history"][0] is second["history"][0]
    assert first["candidates"][1] is second["candidates"][0] is dataset["valid"][0]["utterances"][0]["history"][0]
    assert dataset["train"][0]["personality"][0] is second["history"][2] is dataset["valid"][0]["personality"][0]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_only_the_splits_that_are_there(gpt, dataset_path, stem, split):
    dataset_path.write_text(json.dumps({split: DATASET[split]}))
    for _ in range(2):  # tokenised, then from the cache
        assert get_dataset(gpt, dataset_path, stem) == {split: by_hand(gpt, DATASET[split])}


def test_texts_and_tokens_of_a_loaded_dataset_correspond(gpt, dataset_path, stem):
    """From the cache the splits came in any order, and with them the personas that a seeded chat draws from."""
    for _ in range(5):
        dataset = load_dataset(gpt, dataset_path, stem)
        assert dataset.all_dialogs(dataset.texts) == DATASET
        assert dataset.splits == ["train", "valid"]
        assert len(set(dataset.texts)) == len(dataset.texts) == len(dataset.tokens)
        assert dataset.tokens == tokenize(gpt, dataset.texts)


# The cache


def test_a_second_start_does_not_tokenise(gpt, dataset_path, stem, monkeypatch):
    first = get_dataset(gpt, dataset_path, stem)
    assert len(caches(stem)) == 1
    monkeypatch.setattr(dataset, "tokenize", lambda *_: pytest.fail("tokenised again"))
    assert get_dataset(gpt, dataset_path, stem) == first


def test_the_cache_lies_beside_its_stem(gpt, dataset_path, stem):
    get_dataset(gpt, dataset_path, stem)
    (cache,) = caches(stem)
    assert re.fullmatch(r"stem_[0-9a-f]{16}\.bin", cache.name)


def test_no_stem_no_cache(gpt, dataset_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_dataset(gpt, dataset_path, "") == by_hand(gpt, DATASET)
    assert os.listdir() == ["data"]


def test_another_dataset_gets_another_cache(gpt, dataset_path, stem):
    """The original's cache did not know which dataset it held: an old one was used for a new file."""
    get_dataset(gpt, dataset_path, stem)
    changed = json.loads(json.dumps(DATASET).replace("two dogs", "ten dogs"))
    dataset_path.write_text(json.dumps(changed))
    assert get_dataset(gpt, dataset_path, stem) == by_hand(gpt, changed)
    assert len(caches(stem)) == 2


def test_a_file_that_is_another_split_gets_another_cache(gpt, tmp_path, stem):
    lines = "1 hi\thello\t\tno|hello\n"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(lines)
        assert list(get_dataset(gpt, tmp_path / f"{split}.txt", stem)) == [split]


def test_another_tokenizer_gets_another_cache(checkpoints, gpt, gpt2, spacy_gpt, dataset_path, stem, tmp_path):
    shutil.copytree(checkpoints["gpt"], tmp_path / "other")
    other = json.loads(gpt.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in other["merges"][:-1]]
    type(gpt)(vocab=other["vocab"], merges=merges).save_pretrained(tmp_path / "other")
    tokenizers = [gpt, gpt2, spacy_gpt, load_tokenizer(tmp_path / "other", "basic")]
    for number, tokenizer in enumerate(tokenizers, 1):
        get_dataset(tokenizer, dataset_path, stem)
        assert len(caches(stem)) == number


def test_an_added_token_that_texts_become_gets_another_cache(gpt2, checkpoints, dataset_path, stem):
    """Ordinary added tokens were no part of the cache's key, so an old cache was used for another tokenizer."""
    get_dataset(gpt2, dataset_path, stem)
    other = load_tokenizer(checkpoints["gpt2"])
    other.add_special_tokens({"additional_special_tokens": ["like"]}, replace_extra_special_tokens=False)
    get_dataset(other, dataset_path, stem)
    assert len(caches(stem)) == 1, "texts never become special tokens"
    other = load_tokenizer(checkpoints["gpt2"])
    other.add_tokens(["tea"])
    assert get_dataset(other, dataset_path, stem) != get_dataset(gpt2, dataset_path, stem)
    assert get_dataset(other, dataset_path, stem) == get_dataset(other, dataset_path, "")
    assert len(caches(stem)) == 2


def test_the_same_tokenizer_from_elsewhere_finds_the_cache(checkpoints, dataset_path, stem, tmp_path, family):
    get_dataset(load_tokenizer(checkpoints[family]), dataset_path, stem)
    copy = tmp_path / "copy"
    load_tokenizer(checkpoints[family]).save_pretrained(copy)
    shutil.copy(checkpoints[family] / "config.json", copy)
    get_dataset(load_tokenizer(copy), dataset_path, stem)
    assert len(caches(stem)) == 1


def test_bad_dialogs_are_left_out_for_those_who_ask_alone(gpt, dataset_path, stem, caplog):
    """Their cache must not serve a start that has to end with the faults."""
    dataset_path.write_text(json.dumps(DATASET | {"train": [None, *DATASET["train"]]}))
    for _ in range(2):
        assert get_dataset(gpt, dataset_path, stem, skip_bad_dialogs=True) == by_hand(gpt, DATASET)
    assert "1 bad dialogs are left out" in caplog.text
    with pytest.raises(UserError, match="train dialog 1: expected an object, got null"):
        get_dataset(gpt, dataset_path, stem)


def test_added_special_tokens_do_not_change_the_cache(base_checkpoints, dataset_path, stem, family):
    """Training adds them, and the run's own chat must not tokenise anew."""
    tokenizer = load_tokenizer(base_checkpoints[family])
    before = get_dataset(tokenizer, dataset_path, stem)
    assert tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN) == 5
    assert get_dataset(tokenizer, dataset_path, stem) == before
    assert len(caches(stem)) == 1


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The content cut at some place, or with some byte changed; the first and the last byte among them."""
    place = generator.choice([0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(8))])
    if generator.random() < 0.5:
        return content[:place]
    return content[:place] + bytes([content[place] ^ generator.randrange(1, 256)]) + content[place + 1 :]


def test_a_damaged_cache_is_noticed_and_rebuilt(gpt, dataset_path, stem, caplog):
    want = get_dataset(gpt, dataset_path, stem)
    (cache,) = caches(stem)
    content = cache.read_bytes()
    for seed in range(200):
        cache.write_bytes(damaged(content, random.Random(seed)))
        caplog.clear()
        assert get_dataset(gpt, dataset_path, stem) == want
        (line,) = warnings(caplog)
        assert line.startswith(f"{cache} is damaged") and "\n" not in line
        assert caches(stem) == [cache] and cache.read_bytes() == content


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("with_checksum", [False, True])
def test_a_pickle_in_the_place_of_the_cache_is_not_loaded(gpt, dataset_path, stem, tmp_path, with_checksum):
    """The original's cache was a pickle, which runs what it is told to."""
    want = get_dataset(gpt, dataset_path, stem)
    (cache,) = caches(stem)
    payload = pickle.dumps(Trap(tmp_path / "trapped"))
    cache.write_bytes(hashlib.blake2b(payload).digest() * with_checksum + payload)
    assert get_dataset(gpt, dataset_path, stem) == want
    assert not (tmp_path / "trapped").exists()
    pickle.loads(payload)
    assert (tmp_path / "trapped").exists(), "this trap would not have caught anything"


@pytest.mark.parametrize("function", ["tempfile.mkstemp", "os.replace"])
def test_a_cache_that_cannot_be_written_is_a_warning(gpt, dataset_path, stem, monkeypatch, caplog, function):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(f"transfertransfo.files.{function}", refuse)
    assert get_dataset(gpt, dataset_path, stem) == by_hand(gpt, DATASET)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"The cache {stem.parent}") and "Permission denied" in warning
    assert caches(stem) == []


@pytest.mark.parametrize("bad", [".", "/", "data/dataset.json/cache.bin"])
def test_a_cache_that_cannot_be_is_one_clear_line(gpt, dataset_path, tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^dataset_cache {re.escape(bad.split('.json')[0])}") as error:
        get_dataset(gpt, dataset_path, bad)
    assert "\n" not in str(error.value)


def test_a_dataset_that_may_not_be_read_is_one_clear_line(gpt, dataset_path, stem, monkeypatch):
    """Its content is read for the cache's key before it is read as dialogs."""
    refused = "raise PermissionError(13, 'Permission denied')"
    monkeypatch.setattr("transfertransfo.data.dataset.hashlib.file_digest", lambda *_: exec(refused))
    with pytest.raises(UserError, match=f"^{re.escape(str(dataset_path))}: cannot be read: Permission denied$"):
        get_dataset(gpt, dataset_path, stem)


def test_two_processes_at_once(gpt, dataset_path, stem):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()

    def load():
        barrier.wait(timeout=20)
        results.put([get_dataset(gpt, dataset_path, stem) for _ in range(5)])

    processes = [context.Process(target=load, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    barrier.wait(timeout=20)
    want = by_hand(gpt, DATASET)
    for _ in processes:
        assert results.get(timeout=20) == [want] * 5
    for process in processes:
        process.join(timeout=20)
    assert len(caches(stem)) == 1


# The tokenizer of a checkpoint


@pytest.fixture
def gpt_copy(tmp_path, base_checkpoints, checkpoints):
    """Makes copies of a checkpoint of GPT, with the dialog tokens or without, that have no record yet."""

    def copy(fine_tuned):
        folder = tmp_path / f"gpt-{fine_tuned}"
        shutil.copytree((checkpoints if fine_tuned else base_checkpoints)["gpt"], folder)
        config = folder / "tokenizer_config.json"
        settings = json.loads(config.read_text())
        settings.pop("gpt_tokenization", None)
        config.write_text(json.dumps(settings))
        return folder

    return copy


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_gpt_tokenization_default_record_and_flag(gpt_copy, tmp_path, fine_tuned):
    folder = gpt_copy(fine_tuned)
    default, other = ("basic", "spacy") if fine_tuned else ("spacy", "basic")
    assert load_tokenizer(folder).init_kwargs["gpt_tokenization"] == default
    flagged = load_tokenizer(folder, other)
    assert flagged.init_kwargs["gpt_tokenization"] == other
    flagged.save_pretrained(folder)  # now there is a record
    assert load_tokenizer(folder).init_kwargs["gpt_tokenization"] == other
    assert load_tokenizer(folder, default).init_kwargs["gpt_tokenization"] == default
    AutoTokenizer.from_pretrained(folder)


def test_gpt_tokenization_is_refused_for_gpt2(checkpoints):
    assert "gpt_tokenization" not in load_tokenizer(checkpoints["gpt2"]).init_kwargs
    with pytest.raises(UserError, match=r"^gpt_tokenization basic: .* is no GPT$"):
        load_tokenizer(checkpoints["gpt2"], "basic")


@pytest.mark.parametrize("files", [(), ("tokenizer_config.json",), ("vocab.json",), ("merges.txt",)])
def test_a_folder_without_tokenizer(base_checkpoints, family, tmp_path, files):
    shutil.copy(base_checkpoints[family] / "config.json", tmp_path)
    for name in files:
        (tmp_path / name).write_text("{}")
    expected = f"^model_checkpoint {re.escape(str(tmp_path))}: no .*tokenizer there"
    with pytest.raises(UserError, match=expected) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": 3}', "\x00\x01", '"a"', '{"version": "1.0"}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_damaged_file_of_a_checkpoint_is_one_clear_line(checkpoints, family, tmp_path, name, content):
    """Found by feeding it: errors without a text gave an IndexError of our own, and some files an AttributeError."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints[family], folder)
    (folder / name).write_text(content)
    try:
        load_tokenizer(folder)
        load_model(folder)
    except UserError as error:
        assert str(error).startswith(f"model_checkpoint {folder}: ") and "\n" not in str(error)
    else:
        assert name == "tokenizer_config.json" and content.startswith("{")  # nothing in it is needed


def test_an_error_without_a_text_gets_a_line_too(tmp_path):
    for error in (EOFError(), ValueError("\nfirst\nsecond")):
        line = str(sources.cannot_load(tmp_path, "weights", error))
        assert line.startswith(f"model_checkpoint {tmp_path}: no usable weights there (")
        assert "\n" not in line and not line.endswith("()")


# What --model_checkpoint stands for


def test_resolve_checkpoint(checkpoints):
    folder = checkpoints["gpt"]
    assert resolve_checkpoint(folder) == str(folder)
    assert resolve_checkpoint("openai-gpt") == "openai-community/openai-gpt"
    assert resolve_checkpoint("gpt2") == "openai-community/gpt2"
    assert resolve_checkpoint("someone/some-model_1.0") == "someone/some-model_1.0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "has no config.json"),
        ("model.bin", "got a file"),
        ("./nothing", "no such folder"),
        ("a/b/c", "no such folder"),
        ("/nothing/there", "no such folder"),
        ("what is this", "no such folder"),
        ("x" * 5000 + "/.", "no such folder"),
        ("", "no such folder"),
    ],
)
def test_a_checkpoint_that_is_none(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"weights")
    with pytest.raises(UserError, match=f"^model_checkpoint .*{message}") as error:
        resolve_checkpoint(name)
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Without network an unknown name was tried for 50 seconds, over 30 lines of warnings."""
    asked = []

    def no_network(name, file, local_files_only=False):
        asked.append(local_files_only)
        if local_files_only:
            return False
        raise ConnectionError

    monkeypatch.setattr(sources, "has_file", no_network)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("tried all the same"))
    with pytest.raises(UserError, match=r"^model_checkpoint gpt2: neither a folder nor a model that can be had"):
        load_tokenizer("gpt2")
    assert asked == [True, False]


@pytest.mark.parametrize("cached", [True, False])
def test_a_hub_model_loads_from_the_cache_or_from_the_hub(checkpoints, monkeypatch, cached):
    tokenizer = load_tokenizer(checkpoints["gpt2"])
    monkeypatch.setattr(sources, "has_file", lambda *_, local_files_only: local_files_only == cached)
    monkeypatch.setattr(sources, "load_config", lambda _: "the configuration")
    loading = {"openai-community/gpt2": tokenizer}
    from_pretrained = lambda pretrained_model_name_or_path, **_: loading[pretrained_model_name_or_path]  # noqa: E731
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    assert load_tokenizer("gpt2") is tokenizer


def test_a_url_is_downloaded_and_extracted(checkpoints, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "fetch", lambda url: asked.append(url) or url)
    monkeypatch.setattr(sources, "extract", lambda archive: checkpoints["gpt"])
    assert resolve_checkpoint("https://example.org/model.tar.gz") == str(checkpoints["gpt"])
    assert sources.download_pretrained_model() == str(checkpoints["gpt"])
    assert asked == ["https://example.org/model.tar.gz", sources.HF_FINETUNED_MODEL]


def test_no_dataset_path_is_personachat(gpt, dataset_path, monkeypatch):
    asked = []
    monkeypatch.setattr(dataset, "fetch", lambda url: asked.append(url) or dataset_path)
    assert get_dataset(gpt, "", "") == get_dataset(gpt, "https://example.org/d.json", "") == by_hand(gpt, DATASET)
    assert asked == [dataset.PERSONACHAT_URL, "https://example.org/d.json"]


# Run folders and files


@pytest.fixture
def frozen_clock(monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2019, 11, 21, 20, 57, 1)

    monkeypatch.setattr(runs, "datetime", Clock)
    monkeypatch.setattr(runs.socket, "gethostname", lambda: "host")


@pytest.mark.parametrize("model_name", ["gpt2", "openai-community/gpt2", "/models/gpt2/", "https://example.org/gpt2"])
def test_name_of_a_run_folder(tmp_path, monkeypatch, frozen_clock, model_name):
    monkeypatch.chdir(tmp_path)
    assert make_logdir(model_name) == os.path.join("runs", "Nov21_20-57-01_host_gpt2")
    assert os.path.isdir("runs/Nov21_20-57-01_host_gpt2")


def test_starts_in_one_second_do_not_collide(tmp_path, monkeypatch, frozen_clock):
    """Two runs that started in the same second wrote into one folder."""
    monkeypatch.chdir(tmp_path)
    barrier, folders = threading.Barrier(8), []

    def start():
        barrier.wait()
        folders.append(make_logdir("gpt2"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    suffixes = ["", *(f"_{i}" for i in range(2, 9))]
    assert sorted(folders) == sorted(f"runs/Nov21_20-57-01_host_gpt2{suffix}" for suffix in suffixes)
    assert sorted(os.listdir("runs")) == sorted(map(os.path.basename, folders))


def test_runs_that_cannot_be_a_folder_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"^runs/.*: cannot make the run folder"):
        make_logdir("gpt2")


def test_attr_dict():
    attributes = AttrDict({"a": 1}, b=2)
    attributes.c = 3
    attributes["d"] = 4
    assert (attributes.a, attributes["b"], attributes.d) == (1, 2, 4)
    assert attributes == {"a": 1, "b": 2, "c": 3, "d": 4}
    with pytest.raises(AttributeError):
        _ = attributes.e


def test_the_garbage_collector_is_as_before_in_the_end():
    assert gc.isenabled()
    with pytest.raises(KeyError), dataset.paused_collector():
        with dataset.paused_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


# Text that the tokenizer cannot write


KOREAN = ["안녕하세요 만나서 반가워요", "저는 강아지 두 마리를 키워요", "정말요? 저는 고양이를 좋아해요"]


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_text_that_the_tokenizer_cannot_write_is_refused(gpt, spacy_gpt, gpt2, dataset_path, stem, cached, caplog):
    """A model was trained on 97 % `<unk>`, ended at a ppl of 1.75 and answered with blanks; nobody said a word."""
    utterances = [{"history": KOREAN[:1], "candidates": KOREAN[1:]}]
    dataset_path.write_text(json.dumps({"train": [{"personality": KOREAN, "utterances": utterances}]}))
    for tokenizer in (gpt, spacy_gpt):
        for _ in range(2):
            with pytest.raises(UserError) as error:
                get_dataset(tokenizer, dataset_path, stem if cached else "")
            line = str(error.value)
            assert re.fullmatch(rf"{dataset_path}: (\d+\.\d)% of its tokens are unknown to .* '.*'; .*gpt2.*", line)
            assert float(re.search(r"([\d.]+)%", line)[1]) > 90 and any(text in line for text in KOREAN)
    get_dataset(gpt2, dataset_path, stem)
    assert "unknown" not in caplog.text


@pytest.mark.parametrize(("known", "says"), [(2, True), (40, False)])
def test_some_text_that_the_tokenizer_cannot_write_is_said_at_each_start(gpt, tmp_path, stem, caplog, known, says):
    utterances = [{"history": ["tea " * i + "."], "candidates": ["no .", "yes ."]} for i in range(known)]
    utterances[0]["history"].append("tea : 차 .")
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"train": [{"utterances": utterances}]}))
    lines = []
    for dataset_cache in ("", stem, stem):
        caplog.clear()
        get_dataset(gpt, path, dataset_cache)
        lines.append([r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING])
    assert lines[0] == lines[1] == lines[2]
    assert bool(lines[0]) == says
    assert not says or "'tea : 차 .'" in lines[0][0]


# Distractors


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_distractors_come_from_the_dialogs_that_are_asked_for_alone(gpt, tmp_path, stem, cached):
    """They were drawn from all before some were held out: of 54 replies held out 50 were wrong answers in training."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    dialogs = [{"utterances": [{"reply": f"{a} {b} ."} for b in letters[:3]]} for a in letters]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"train": dialogs}))
    for _ in range(2):
        loaded = load_dataset(gpt, path, stem if cached else "")
        assert loaded.count("train") == 26
        whole = loaded.dialogs("train", loaded.texts)
        for stop in (20, 26, None, 2):
            some = loaded.dialogs("train", loaded.texts, stop)
            replies = [{utterance["candidates"][-1] for utterance in dialog["utterances"]} for dialog in some]
            assert replies == [
                {utterance["candidates"][-1] for utterance in dialog["utterances"]} for dialog in whole[:stop]
            ]
            for dialog, own in zip(some, replies):
                for utterance in dialog["utterances"]:
                    assert {*utterance["candidates"][:-1]} <= set().union(*replies) - own
                    assert len(utterance["candidates"]) == min(19, 3 * (len(some) - 1)) + 1
            numbers = loaded.dialogs("train", [*range(len(loaded.texts))], stop)
            texts = [[[loaded.texts[i] for i in u["candidates"]] for u in d["utterances"]] for d in numbers]
            assert texts == [[u["candidates"] for u in d["utterances"]] for d in some], "the same for tokens and texts"


@pytest.mark.parametrize("share", [0.01, 0.3, 0.75])
def test_dialogs_held_out_are_the_validation_split(gpt, tmp_path, share):
    """In training and in the evaluation alike; their distractors are drawn as if each side were a dataset by itself."""
    dialogs = [{"personality": ["i am ."] * (i % 3), "utterances": [{"reply": f"{a} {b} .", "history": ["hi"] * i}
                for b in "xyz"[: 1 + i % 3]]} for i, a in enumerate("abcdefgh")]  # fmt: skip
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"train": dialogs}))
    whole = load_dataset(gpt, path, "")
    left = len(dialogs) - max(1, round(len(dialogs) * share))
    parted = whole.hold_out(share)
    assert (whole.splits, parted.splits) == (["train"], ["train", "valid"])
    assert (parted.count("train"), parted.count("valid")) == (left, len(dialogs) - left)
    for split, part in (("train", dialogs[:left]), ("valid", dialogs[left:])):
        path.write_text(json.dumps({"train": part}))
        alone = load_dataset(gpt, path, "")
        for sentences in ("texts", "tokens"):
            own, want = (getattr(dataset, sentences) for dataset in (parted, alone))
            assert parted.dialogs(split, own) == alone.dialogs("train", want)
    with pytest.raises(UserError, match="too few dialogs"):
        whole.hold_out(0.95)


def test_a_dataset_s_distractors_are_those_that_its_reader_draws(gpt, tmp_path):
    dialogs = [{"utterances": [{"reply": f"yes {number} ."}] * 2} for number in ("one", "two", "three", "four")]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"train": dialogs, "valid": dialogs[:2] + DATASET["valid"]}))
    loaded = load_dataset(gpt, path, "")
    assert loaded.all_dialogs(loaded.texts) == read_dialogs([path])


@pytest.mark.parametrize("num_candidates", [0, 1, 2, 3, 20])
def test_the_last_candidates_alone_are_kept(gpt, tmp_path, num_candidates):
    """Of rows of all lengths, some of which have their distractors drawn."""
    rows = [[f"{a} {b} ." for b in "abcdefgh"[:n]] for a, n in zip("stuvwxyz", (1, 4, 2, 1, 8, 3, 1, 5))]
    dialogs = [
        {"utterances": [{"history": ["hi"], "candidates": row} for row in rows[i : i + 2]]} for i in range(0, 8, 2)
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"train": dialogs}))
    loaded = load_dataset(gpt, path, "")
    for stop in (None, 3):
        want = loaded.dialogs("train", loaded.texts, stop)
        assert all(len(u["candidates"]) > 1 for dialog in want for u in dialog["utterances"])
        for utterance in (u for dialog in want for u in dialog["utterances"]):
            utterance["candidates"] = utterance["candidates"][-num_candidates:]
        assert loaded.dialogs("train", loaded.texts, stop, num_candidates) == want

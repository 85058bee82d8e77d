"""Files of strangers that would run code: each payload would make a folder, and none does.

Archives are in test_download.py, the dataset's cache in data/test_dataset.py.
"""

import io
import json
import os
import pickle
import shutil
import stat
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from transfertransfo.errors import UserError
from transfertransfo.files import open_atomically
from transfertransfo.model.loading import load_finetuned, load_model
from transfertransfo.model.sources import load_tokenizer
from transfertransfo.training import checkpoints as checkpoint_files


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def in_zip(pickled: bytes) -> bytes:
    """Pickled bytes in torch's own zip format."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def legacy_tar(trap: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(trap)
            file.addfile(info, io.BytesIO(trap))
    return buffer.getvalue()


def torchscript(trap: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in (("data.pkl", trap), ("constants.pkl", trap), ("version", "3\n")):
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def call(function: str, argument: str) -> bytes:
    """The pickle of a call, written by hand: `pickle` itself would not name such a function."""
    return b"\x80\x02c" + function.replace(" ", "\n").encode() + b"\n(V" + argument.encode() + b"\ntR."


PAYLOADS = {
    "pickle": lambda path: pickle.dumps(Trap(path)),
    "zip": lambda path: saved({"weight": torch.zeros(2), "trap": Trap(path)}),
    "legacy": lambda path: saved({"trap": Trap(path)}, _use_new_zipfile_serialization=False),
    "legacy tar": lambda path: legacy_tar(pickle.dumps(Trap(path), 2)),
    "torchscript": lambda path: torchscript(pickle.dumps(Trap(path), 2)),
    "exec": lambda path: in_zip(call("builtins exec", f"import os; os.mkdir({str(path)!r})")),
    "system": lambda path: in_zip(call("posix mkdir", str(path))),
    "through torch": lambda path: in_zip(call("torch.serialization os.mkdir", str(path))),
    "eval": lambda path: in_zip(call("numpy.f2py.crackfortran myeval", f"__import__('os').mkdir({str(path)!r})")),
}


@pytest.fixture
def model(tmp_path, checkpoint) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture
def trap(tmp_path):
    path = tmp_path / "trapped"
    yield path
    assert not path.exists(), "code of a file was run"


@pytest.mark.parametrize("name", ["pickle", "zip", "legacy", "exec", "system"])
def test_the_traps_would_spring(tmp_path, name):
    content = PAYLOADS[name](tmp_path / "trapped")
    try:
        torch.load(io.BytesIO(content), weights_only=False)
    except RuntimeError:  # no file of torch's, which it notices too late
        assert name == "pickle"
    assert (tmp_path / "trapped").exists()


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_are_a_pickle(model, trap, payload, sharded):
    (model / "model.safetensors").unlink()
    name = "shard.bin" if sharded else "pytorch_model.bin"
    (model / name).write_bytes(PAYLOADS[payload](trap))
    if sharded:
        weights = dict.fromkeys(("transformer.tokens_embed.weight", "transformer.wte.weight"), name)
        (model / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with pytest.raises(UserError) as error:
        load_model(model)
    assert str(error.value).startswith(f"model_checkpoint {model}: no usable weights there (not safe to load")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_checkpoint_to_resume_from(tmp_path, trap, payload):
    (tmp_path / "checkpoint_3.pt").write_bytes(PAYLOADS[payload](trap))
    with pytest.raises(UserError, match=r"checkpoint_3\.pt: damaged \(not safe to load") as error:
        checkpoint_files.load_checkpoint(tmp_path, {"model": torch.nn.Linear(1, 1)})
    assert "\n" not in str(error.value)


def test_pickles_that_nothing_needs_are_not_read(model, trap):
    """The original kept its arguments in model_training_args.bin, a pickle, and its checkpoints beside it."""
    for name in (
        "model_training_args.bin",
        "training_args.bin",
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "checkpoint_1.pt",
        "dataset_cache.bin",
        "tokenizer.pkl",
        "vocab.pkl",
    ):
        (model / name).write_bytes(PAYLOADS["pickle"](trap))
    load_finetuned(str(model), device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [False, True])
def test_code_that_comes_with_a_checkpoint(model, trap, monkeypatch, name, known):
    """transformers runs it with trust_remote_code, and where nothing is said asks on a terminal whether to."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\nclass Evil: pass\n")
    values = json.loads((model / name).read_text())
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor")
    values["auto_map"] = dict.fromkeys(classes, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    values["trust_remote_code"] = True
    values["custom_pipelines"] = {"evil": {"impl": "evil.Evil", "pt": ["AutoModel"]}}
    if not known:
        values |= {"model_type": "evil", "tokenizer_class": "Evil", "architectures": ["Evil"]}
    (model / name).write_text(json.dumps(values))
    try:
        load_finetuned(str(model), device="cpu")
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model"])
def test_a_tokenizer_with_parts_of_its_own(model, trap, part):
    state = json.loads((model / "tokenizer.json").read_text())
    state[part] = {"type": "Custom", "module": "os", "function": "mkdir", "arguments": [str(trap)]}
    (model / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="no usable tokenizer there"):
        load_tokenizer(model)


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for x in range(10**9) %}"])
def test_a_chat_template_is_not_rendered(model, template, monkeypatch):
    """The second one would take hours."""
    (model / "chat_template.jinja").write_text(template)
    rendered = []
    monkeypatch.setattr("jinja2.Template.render", lambda *_, **__: rendered.append(template))
    _, tokenizer = load_finetuned(str(model), device="cpu")
    assert tokenizer.chat_template == template and rendered == []


def test_temporary_files_are_private(tmp_path):
    """Where anyone may write, as in /tmp, nobody else reads them or puts a link in their way."""
    before = os.umask(0)
    try:
        with open_atomically(tmp_path / "file") as file:
            (temporary,) = tmp_path.iterdir()
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            file.write(b"")
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    finally:
        os.umask(before)


def test_nothing_is_fetched_over_plain_http_by_itself():
    for path in [*ROOT.glob("*.py"), *(ROOT / "transfertransfo").rglob("*.py")]:
        text = path.read_text()
        for allowed in ('"http://", "https://"', 'adapters["http://"]', 'f"http://{place}:'):  # the last: its own page
            text = text.replace(allowed, "")
        assert "http://" not in text

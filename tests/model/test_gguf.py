"""GGUF files are unpacked once; what is kept is exact, is the file's own content, and is whole."""

import json

import pytest
import torch
from safetensors import safe_open
from test_other_models import write_gguf

from transfertransfo.errors import UserError
from transfertransfo.model import gguf
from transfertransfo.model.loading import load_model
from transfertransfo.model.sources import load_config, load_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFERTRANSFO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unpacked(monkeypatch):
    """The files that transformers unpacks."""
    files, unpack = [], gguf.unpack
    monkeypatch.setattr(gguf, "unpack", lambda family, file, *rest: files.append(file) or unpack(family, file, *rest))
    return files


def make_file(base_checkpoints, path, seed=1):
    torch.manual_seed(seed)
    write_gguf(path, load_tokenizer(base_checkpoints["llama"]),
               load_model(base_checkpoints["llama"], from_scratch=True).pretrained)  # fmt: skip
    return path


def seeded_state(file) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return load_model(file).pretrained.state_dict()


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (torch.nn.Identity(), "missing 1, as model.layers.1.mlp.up_proj.weight"),
        (
            torch.nn.Linear(16, 8, bias=False),
            r"another shape 1, as model.layers.1.mlp.up_proj.weight of the shape .8, 16",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(base_checkpoints, cache, tmp_path, layer, message):
    model = load_model(base_checkpoints["llama"], from_scratch=True).pretrained
    model.model.layers[1].mlp.up_proj = layer
    write_gguf(tmp_path / "a.gguf", load_tokenizer(base_checkpoints["llama"]), model)
    with pytest.raises(UserError, match=f"no usable weights there .not those of the model in config.json: {message}"):
        load_model(tmp_path / "a.gguf")
    assert not [*cache.glob("gguf-*")], "nothing to begin with is kept"


def test_a_file_is_unpacked_once_and_its_header_read_once(base_checkpoints, cache, unpacked, tmp_path, monkeypatch):
    """Each start read the header twice and made the map of names 400 times: 30 seconds for SmolLM2."""
    file = make_file(base_checkpoints, tmp_path / "a.gguf")
    first, config = seeded_state(file), load_config(file).to_dict()
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", None)
    gguf.config_in_header.cache_clear()
    assert_same(first, seeded_state(file))
    assert load_config(file).to_dict() == config
    assert unpacked == [str(file)] and first["model.embed_tokens.weight"].dtype == torch.float32
    assert len(list(cache.iterdir())) == 1, "nothing half written is left there"


def test_the_content_counts_and_not_the_name(base_checkpoints, cache, unpacked, tmp_path):
    one, other = (make_file(base_checkpoints, tmp_path / f"{seed}.gguf", seed) for seed in (1, 2))
    states = [seeded_state(file) for file in (one, other)]
    one.rename(tmp_path / "3.gguf")
    other.rename(one)
    assert_same(seeded_state(one), states[1])
    assert_same(seeded_state(tmp_path / "3.gguf"), states[0])
    assert len(unpacked) == 2


def test_a_copy_that_is_damaged_or_of_another_kind_is_made_anew(base_checkpoints, cache, unpacked, tmp_path):
    file = make_file(base_checkpoints, tmp_path / "a.gguf")
    state = seeded_state(file)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    other = whole.replace(b'"version":"1"', b'"version":"0"')
    assert other != whole
    for n, content in enumerate((whole[:-1], b"", b"x" * 100, whole + b"x", other), 2):
        kept.write_bytes(content)
        assert_same(seeded_state(file), state)
        assert len(unpacked) == n and kept.stat().st_size == len(whole)


def test_without_a_place_to_keep_it_in_the_file_is_read_all_the_same(
    base_checkpoints, cache, unpacked, tmp_path, caplog
):
    file = make_file(base_checkpoints, tmp_path / "a.gguf")
    cache.touch()
    without = seeded_state(file)
    assert "a.gguf is unpacked each time: its weights could not be kept (" in caplog.text
    cache.unlink()
    assert_same(seeded_state(file), without)
    assert_same(seeded_state(file), without)
    assert len(unpacked) == 2


def test_only_an_exact_half_is_kept(base_checkpoints, cache, tmp_path):
    exact, tiny = torch.tensor([0.5, 65504.0]), torch.tensor([2.0**-30, 2.0**100])
    assert gguf.smallest(exact).dtype == torch.float16 and gguf.smallest(tiny).dtype == torch.bfloat16
    assert gguf.smallest(torch.tensor([0.1])).dtype == torch.float32
    seeded_state(make_file(base_checkpoints, tmp_path / "a.gguf"))
    (path,) = cache.iterdir()
    with safe_open(path, "pt") as kept:
        names, record = set(kept.keys()), kept.metadata()
    assert "lm_head.weight" not in names and not [name for name in names if name.startswith("multiple_choice_head")]
    assert json.loads(record["config"])["model_type"] == "llama"

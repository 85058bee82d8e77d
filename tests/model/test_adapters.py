"""An adapted model, the same reloaded, and the two merged are one function, in every family; transformers agrees."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import adapt, make_base, run_training, slow_but
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from transfertransfo.data.inputs import Example, make_fork
from transfertransfo.data.tokenization import SPECIAL_TOKENS, special_ids
from transfertransfo.data.trees import pack
from transfertransfo.errors import UserError
from transfertransfo.model.double_heads import (
    DoubleHeads,
    add_special_tokens_,
    base_digest,
    freeze_unread_,
    halve_frozen_,
)
from transfertransfo.model.loading import load_finetuned, load_model
from transfertransfo.model.saving import save_model
from transfertransfo.model.sources import load_tokenizer

pytest.importorskip("peft", reason="needs requirements/extra.txt")

WINDOWED = ("mistral", "gemma2", "gemma3_text", "gemma3", "gpt_oss", "cohere2")
BIASED = ("phi", "gptj", "codegen")  # whose output layer has a bias
FAMILIES = (
    "gpt", "gpt2", "llama", "qwen2", "gpt_neox", "opt", "cohere", "granite", "deepseek_v3", "phimoe", "gemma4_text",
    "gemma4",
    *BIASED, *WINDOWED,
)  # fmt: skip


# GPT has embeddings tied the other way round, Gemma 4 windows and a third table.
KINDS = ("gpt", "llama", "gemma4_text")
WITH_TOWERS = ("gemma3", "gemma4")
TOWER = re.compile("vision|audio|multi_modal")


@pytest.fixture(params=slow_but(KINDS, FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def bases(base_checkpoints, tmp_path_factory):
    """Gives a folder of a tiny model of a family: weights at which each part matters, without the dialog tokens."""

    @functools.cache
    def make(family: str) -> Path:
        window = {"sliding_window": 4} if family in WINDOWED else {}  # shorter than the texts
        return make_base(tmp_path_factory.mktemp(f"{family}-base"), base_checkpoints, family, **window)

    return make


@pytest.fixture
def base(family, bases) -> Path:
    return bases(family)


def save(model: DoubleHeads, tokenizer, folder: Path, merge_lora: bool = False) -> Path:
    folder.mkdir()
    save_model(model, folder, merge_lora=merge_lora)
    tokenizer.save_pretrained(folder)
    return folder


EXAMPLES = [
    Example([[7, 8], [9]], [[9, 10, 11], [13, 14], [15, 16]], [[12, 13], [14], [15, 16, 17]]),
    Example([[20, 8]], [[19, 10, 11]], [[22, 13], [14, 12], [13, 14, 23]]),
]


@torch.inference_mode()
def losses_of(model: DoubleHeads, tokenizer) -> torch.Tensor:
    return trainable_losses(model, tokenizer)


def trainable_losses(model: DoubleHeads, tokenizer) -> torch.Tensor:
    """Language-model loss, choice loss, and the scores of candidates that the choice head must not confuse."""
    batch = pack([make_fork(example, tokenizer) for example in EXAMPLES], tokenizer.pad_token_id)
    logits, scores = model(batch)
    losses = cross_entropy(logits, batch.lm_labels), cross_entropy(scores, batch.choice_labels)
    return torch.cat([torch.stack(losses), scores.flatten()])


def context(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and types of a dialog, up to the reply's speaker: (1, T) each."""
    row = make_fork(Example([[7, 8], [9]], [[9, 10, 11]], [[]]), tokenizer)
    return torch.tensor([row.context]), torch.tensor([row.token_types])


@torch.inference_mode()
def greedy_reply(logits_of, tokenizer, length: int = 12) -> list[int]:
    """The likeliest words, each once, as small models would repeat one. `logits_of` takes token ids and types."""
    ids, types = context(tokenizer)
    start = ids.size(1)
    for _ in range(length):
        logits = logits_of(ids, types)[:, -1:]
        logits[..., ids[0, start:]] = -torch.inf
        word = logits.argmax(-1)
        ids, types = torch.cat([ids, word], 1), torch.cat([types, types[:, -1:]], 1)
    return ids[0, start:].tolist()


def reply_of(model: DoubleHeads, tokenizer) -> list[int]:
    def logits_of(ids, types):
        return model.lm_logits(model.hidden_states(ids, types, torch.arange(ids.size(1))[None]))

    return greedy_reply(logits_of, tokenizer)


def reply_in_transformers(folder: Path, tokenizer, token_types: bool) -> list[int]:
    return greedy_reply(logits_in_transformers(folder, token_types), tokenizer)


def logits_in_transformers(folder: Path, token_types: bool):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return lambda ids, types: model(input_ids=ids, **{"token_type_ids": types} if token_types else {}).logits


def loss_in_transformers(folder: Path, tokenizer, token_types: bool) -> torch.Tensor:
    return loss_by(logits_in_transformers(folder, token_types), tokenizer)


@torch.inference_mode()
def loss_by(logits_of, tokenizer) -> torch.Tensor:
    """The language-model loss, of each sequence alone. `logits_of` takes token ids and types."""
    logits, labels = [], []
    for example in EXAMPLES:
        fork = make_fork(example, tokenizer)
        reply, start = fork.replies[fork.lm_reply], len(fork.context)
        types = [*fork.token_types, *[fork.token_types[-1]] * len(reply)]
        logits += logits_of(torch.tensor([fork.context + reply]), torch.tensor([types]))[0, start - 1 : -1]
        labels += reply
    return cross_entropy(torch.stack(logits), torch.tensor(labels))


def test_adapted_is_reloaded_is_merged(base, tmp_path):
    """transformers ties GPT's two embeddings the other way round, of which peft made two; merging kept one of them. Of
    Gemma 4's table for its layers the rows of the dialog tokens were drawn anew each time.
    """
    adapted, tokenizer = adapt(base)
    want, reply = losses_of(adapted, tokenizer), reply_of(adapted, tokenizer)
    run = save(adapted, tokenizer, tmp_path / "run")
    whole = save(adapted, tokenizer, tmp_path / "whole", merge_lora=True)
    models = {
        "reloaded": load_model(run),
        "merged": load_finetuned(str(run))[0],
        "saved whole": load_model(whole),
        "adapted, after it was saved": adapted,
    }
    assert base_digest(models["reloaded"]) == base_digest(adapted) == base_digest(load_model(run))
    for name, model in models.items():
        torch.testing.assert_close(losses_of(model, tokenizer), want, atol=1e-5, rtol=1e-5, msg=name)
        assert reply_of(model, tokenizer) == reply, name
    assert reply_in_transformers(whole, tokenizer, adapted.token_types) == reply
    loss = loss_in_transformers(whole, tokenizer, adapted.token_types)
    torch.testing.assert_close(loss, want[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", *BIASED])
def test_transformers_and_peft_load_the_same(base, tmp_path):
    """Of an output layer some of whose rows are trained peft leaves out the bias."""
    from peft import PeftModel

    adapted, tokenizer = adapt(base)
    run = save(adapted, tokenizer, tmp_path / "run")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    loaded = PeftModel.from_pretrained(plain, run).eval()
    want = loss_by(lambda ids, _: loaded(input_ids=ids).logits, tokenizer)
    torch.testing.assert_close(losses_of(adapted, tokenizer)[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", slow_but(["phi"], BIASED))
def test_of_an_output_layer_with_a_bias_the_dialog_tokens_are_trained(base, tmp_path):
    flags = ["--n_epochs", 1, "--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--lr", 0.01]
    run = run_training(tmp_path, base, *flags, "--lora_rank", 2)
    begun, tokenizer = load_model(base), load_tokenizer(base)
    add_special_tokens_(begun, tokenizer)
    before, after = (model.pretrained.get_output_embeddings() for model in (begun, load_finetuned(str(run.folder))[0]))
    dialog = torch.zeros(len(tokenizer), dtype=torch.bool)
    dialog[special_ids(tokenizer)[:-1]] = True  # <pad> is in no text
    assert before.bias[special_ids(tokenizer)[1]] == before.bias[load_tokenizer(base).eos_token_id] != 0
    for old, new in ((before.weight, after.weight), (before.bias, after.bias)):
        changed = (old != new).reshape(len(tokenizer), -1).any(-1)
        assert changed[dialog].all() and not changed[: -len(SPECIAL_TOKENS)].any()


@pytest.mark.parametrize("family", [*KINDS, "gemma4"])
def test_adapters_are_where_a_text_passes(base, family):
    """In a tower for images they had no gradient, for which several processes waited. Gemma 4's towers have layers of a
    class of their own by the names of the decoder's, which peft refused.
    """
    model, tokenizer = adapt(base)
    losses = model(pack([make_fork(Example([[7]], [[9]], [[12, 13], [14]]), tokenizer)], tokenizer.pad_token_id))
    (losses[0].sum() + losses[1].sum()).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert not any(map(TOWER.search, trained)) and any("lora_A" in name for name in trained)


@pytest.mark.parametrize("family", ["llama", *WITH_TOWERS])
def test_what_no_text_passes_is_not_trained(base, family):
    model, tokenizer = load_model(base), load_tokenizer(base)
    add_special_tokens_(model, tokenizer)
    freeze_unread_(model)
    losses = model(pack([make_fork(Example([[7]], [[9]], [[12, 13], [14]]), tokenizer)], tokenizer.pad_token_id))
    (losses[0].sum() + losses[1].sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad == (not TOWER.search(name)), name


@pytest.mark.parametrize("change", ["lost", "more", "of another model", "of another shape", "of a wrapped model"])
@pytest.mark.parametrize("family", ["gpt"])
def test_an_adapters_weights_that_do_not_fit_are_refused(base, tmp_path, change):
    """What was missing began anew, and what was too much was passed over: as the second delta of GPT's embeddings."""
    run = save(*adapt(base), tmp_path / "run")
    weights = load_file(run / "adapter_model.safetensors")
    (name,) = [name for name in weights if name.endswith("h.1.attn.c_attn.lora_B.weight")]
    if change == "more":
        weights["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] = torch.zeros(5, 16)
    else:
        weight = weights.pop(name)
    if change == "of another shape":
        weights[name] = weight[1:].contiguous()
    if change == "of a wrapped model":
        weights = {f"module.{name}": weight for name, weight in weights.items()}
    if change == "of another model":
        weights[name.replace("h.1.", "h.2.")] = weight
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})
    message = f"^model_checkpoint {run}: no usable adapter there .its weights are not those of the adapter: "
    with pytest.raises(UserError, match=message):
        load_model(run)


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """A run folder with an adapter of a Llama."""
    return save(*adapt(bases("llama")), tmp_path_factory.mktemp("adapted") / "run")


ENDLESS = "(a+)+$"  # as a regular expression it takes years on "a" * 60


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "megatron.evil"}, "megatron_"),
        ({"layer_replication": [[0, 2]] * 1000}, "layer_replication: this kind of adapter is not read here"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config: this"),
        ({"rank_pattern": {ENDLESS: 4}}, "rank_pattern: expected ranks by names of parameters, got"),
        ({"alpha_pattern": {ENDLESS: 4}}, "alpha_pattern: expected"),
        ({"layers_to_transform": [0], "layers_pattern": ENDLESS}, "layers_"),
        ({"target_parameters": ENDLESS}, "target_parameters: expected"),
        ({"use_dora": True}, "use_dora: this"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: this"),
        ({"peft_type": "XLORA"}, "peft_type: this"),
        ({"bias": "all"}, "bias: this"),
        ({"field\x1b\n": 1}, "field"),
        ({"target_modules": ENDLESS}, "target_modules: expected names of layers, got"),
        ({"exclude_modules": ENDLESS}, "exclude_modules: expected names of layers, got"),
        ({"target_modules": []}, "target_modules: expected names of layers, got a list"),
        ({"modules_to_save": [ENDLESS]}, "modules_to_save: expected"),
        ({"modules_to_save": None}, "modules_to_save: expected"),
        ({"modules_to_save": ["multiple_choice_head", "lm_head", ENDLESS]}, "modules_to_save: expected"),
        ({"r": 0}, "r: expected a whole number of at least 1, got 0"),
        ({"r": True}, "r: expected"),
        ({"r": "x"}, 'r: expected a whole number of at least 1, got "x"'),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a number above 0, got NaN"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected"),
        ({"lora_dropout": 2}, "lora_dropout: expected"),
        ({"trainable_token_indices": {"model.embed_tokens": [-1]}}, "trainable_token_indices: expected"),
        ({"trainable_token_indices": {"model.embed_tokens": [1, 1]}}, "trainable_token_indices: expected"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: expected a text, got 5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_adapters_configuration_does_not_steer_peft(run, tmp_path, monkeypatch, changed, message):
    """It had peft import modules, run regular expressions and repeat layers."""
    trap = tmp_path / "trapped"
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").touch()
    (tmp_path / "megatron" / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = with_config(run, tmp_path, changed)
    with pytest.raises(UserError, match=f"^{folder}/adapter_config.json: {re.escape(message)}"):
        load_model(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 10**9}, "r or rank_pattern is 1000000000, that of its weights 2"),
        ({"r": 3}, "r or rank_pattern is 3, that of its weights 2"),
        ({"r": 1}, ""),
        ({"rank_pattern": {r".*\.q_proj": 10**9}}, "r or rank_pattern is 1000000000, that of its weights 2"),
        ({"target_modules": ["q_proj"]}, "its weights are not those of the adapter: "),
        ({"target_modules": ["embed_tokens"]}, ""),
        ({"modules_to_save": ["multiple_choice_head", "q_proj"]}, "modules_to_save: q_proj: no output layer of this"),
        ({"modules_to_save": ["multiple_choice_head", "lm_head"]}, "modules_to_save: lm_head: no output layer of this"),
        ({"trainable_token_indices": {"model.embed_tokens": [10**6]}}, "trainable_token_indices: model.embed_tokens"),
        ({"trainable_token_indices": {"model.norm": [1]}}, "trainable_token_indices: model.norm: no embeddings of"),
    ],
)
def test_an_adapters_sizes_are_those_of_its_weights(run, tmp_path, changed, message):
    folder = with_config(run, tmp_path, changed)
    with pytest.raises(UserError, match=rf"^model_checkpoint {folder}: no usable adapter there \({message}"):
        load_model(folder)


def test_an_adapter_on_an_adapter_is_refused(run, tmp_path):
    """One on itself was loaded without end."""
    folder = with_config(run, tmp_path, {"base_model_name_or_path": str(tmp_path / "changed")})
    with pytest.raises(UserError, match=f"^{folder} adapts another model: {folder}: an adapter itself; base_model_"):
        load_model(folder)


def test_a_note_of_peft_that_decides_nothing_is_passed_over(run, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(run)
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    folder = with_config(run, tmp_path, {"auto_mapping": mapping, "peft_version": "9", "task_type": "CAUSAL_LM"})
    assert torch.equal(losses_of(load_model(folder), tokenizer), losses_of(load_model(run), tokenizer))
    assert json.loads((run / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.slow
def test_an_adapter_is_loaded_without_bitsandbytes(run):
    """peft imports it where it is there: a chat began four seconds later."""
    pytest.importorskip("bitsandbytes", reason="needs requirements/extra.txt")
    code = "import sys; from transfertransfo.model.loading import load_finetuned"
    code += f"; load_finetuned({str(run)!r}); assert 'peft' in sys.modules; assert 'bitsandbytes' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def with_config(run: Path, tmp_path: Path, changed: dict) -> Path:
    folder = shutil.copytree(run, tmp_path / "changed")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return folder


def step_in_bfloat16(model, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradients of what is trained."""
    with torch.autocast("cpu", torch.bfloat16):
        losses = trainable_losses(model, tokenizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(losses.sum(), trained)
    return losses.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("family", ["gpt", "gpt2", "llama", "gpt_neox", "opt", "mixtral"])
def test_frozen_weights_in_bfloat16_are_what_autocast_makes_of_them(base, family):
    model, tokenizer = adapt(base)
    want, gradients = step_in_bfloat16(model, tokenizer)
    before = sum(parameter.nbytes for parameter in model.parameters())
    halve_frozen_(model)
    got, gradients_now = step_in_bfloat16(model, tokenizer)
    assert torch.equal(got, want) and torch.equal(gradients_now, gradients) and gradients.any()
    assert sum(parameter.nbytes for parameter in model.parameters()) < before
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "multiple_choice_head" in name:
            assert parameter.dtype == torch.float32, name


def test_a_run_folder_names_the_tokenizers_own_end(base, tmp_path):
    """It had the base's: transformers' `generate` went on after `<eos>`."""
    adapted, tokenizer = adapt(base)
    bos, eos, _, _, pad = special_ids(tokenizer)
    run = save(adapted, tokenizer, tmp_path / "run")
    whole = save(adapted, tokenizer, tmp_path / "whole", merge_lora=True)
    for folder in (run, whole):
        files = [file for file in folder.glob("*config.json") if "eos_token_id" in file.read_text()]
        assert {file.name for file in files} >= {"config.json"}
        for file in files:
            values = json.loads(file.read_text())
            for owner in (values, values.get("text_config", values)):
                assert (owner["bos_token_id"], owner["eos_token_id"], owner["pad_token_id"]) == (bos, eos, pad)
    model = transformers.AutoModelForCausalLM.from_pretrained(whole).eval()

    def end(module, inputs, logits):
        logits[..., eos] = 1e9
        return logits

    ids, _ = context(tokenizer)
    model.get_output_embeddings().register_forward_hook(end)
    with torch.inference_mode():
        reply = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    assert reply[0, ids.size(1) :].tolist() == [eos]


@pytest.mark.parametrize("family", ["llama"])
def test_embeddings_that_differ_are_not_tied(base, tmp_path):
    """transformers kept both, and tied them as soon as the dialog tokens were added: the output's were lost."""
    folder = shutil.copytree(base, tmp_path / "untied")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    add_special_tokens_(model, tokenizer)
    run = save(model, tokenizer, tmp_path / "run")
    for loaded in (model, load_model(run)):
        rows = len(weights["lm_head.weight"])
        assert torch.equal(loaded.pretrained.get_output_embeddings().weight[:rows], weights["lm_head.weight"])
        assert torch.equal(loaded.pretrained.get_input_embeddings().weight[:rows], weights["model.embed_tokens.weight"])

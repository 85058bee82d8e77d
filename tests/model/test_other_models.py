"""Decoders other than GPT from outside, LoRA adapters, tokenizers, GGUF files: what a run writes and what loads it."""

import contextlib
import io
import json
import shutil

import pytest
import torch
import transformers
from families import check_loss
from helpers import AS_IN_5_3, DATASET, FAMILIES, OTHERS, process_as_it_was, run_training, slow_but, tiny_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import convai_evaluation
import interact
from train import train
from transfertransfo.data.inputs import Example, make_fork
from transfertransfo.data.tokenization import SPECIAL_TOKENS, nearest_tokens, special_ids, tokenize
from transfertransfo.data.trees import pack
from transfertransfo.errors import SettingError, UserError, in_flags, require
from transfertransfo.evaluation.evaluator import LabelScorer
from transfertransfo.evaluation.metrics import split_words
from transfertransfo.model.double_heads import add_special_tokens_
from transfertransfo.model.loading import load_finetuned, load_model
from transfertransfo.model.saving import save_model
from transfertransfo.model.sources import load_tokenizer
from transfertransfo.training.checkpoints import list_checkpoints

FLAGS = ["--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--lr", 0.01, "--head_lr", 0.05, "--n_epochs", 2]


def weights_of(run) -> dict[str, torch.Tensor]:
    (file,) = run.folder.glob("*model.safetensors")
    return load_file(file)


def resume_from_the_first_epoch(run) -> None:
    list_checkpoints(run.folder)[-1].unlink()
    with process_as_it_was(), contextlib.chdir(run.folder.parent.parent), contextlib.redirect_stderr(io.StringIO()):
        train(["--resume", str(run.folder)])


def evaluate(run) -> dict:
    flags = ["--eval_type", "all", "--no_sample", "--model_checkpoint", run.folder, "--dataset_cache", "",
             "--dataset_path", run.folder.parent.parent / "dataset.json"]  # fmt: skip
    with process_as_it_was(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return convai_evaluation.run([str(flag) for flag in flags])


def replies_of(run, monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi <eos> !\nany pets ?\n"))
    with process_as_it_was():
        interact.run(["--model_checkpoint", str(run.folder), "--personality", "i like tea .", "--min_length", "3"])
    return capsys.readouterr().out.splitlines()


# Dialog tokens


@pytest.mark.parametrize("family", OTHERS)
def test_dialog_tokens_begin_where_the_tokenizers_own_are(family, base_checkpoints):
    """Drawn anew they said nothing to a model that has learnt its control tokens, and were a sixth as long."""
    tokenizer, model = load_tokenizer(base_checkpoints[family]), load_model(base_checkpoints[family], from_scratch=True)
    end, line_end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Ċ")
    add_special_tokens_(model, tokenizer)
    bos, eos, speaker1, speaker2, pad = special_ids(tokenizer)
    assert end not in (bos, eos)
    for layer in (model.pretrained.get_input_embeddings(), model.pretrained.get_output_embeddings()):
        for token, source in ((bos, end), (eos, end), (speaker1, line_end), (speaker2, line_end)):
            assert torch.equal(layer.weight[token], layer.weight[source])
        assert not any(torch.equal(layer.weight[pad], row) for i, row in enumerate(layer.weight) if i != pad)
    model.pretrained.get_input_embeddings().weight.data[bos] = 7.0
    add_special_tokens_(model, tokenizer)  # a second time nothing is left to add, and what was trained stays
    assert (model.pretrained.get_input_embeddings().weight[bos] == 7).all()


def test_a_token_that_a_model_has_already_stays(base_checkpoints, tmp_path):
    """As Gemma's <bos> and <eos>."""
    tokenizer = load_tokenizer(base_checkpoints["llama"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>", "<eos>"]})
    model = load_model(base_checkpoints["llama"], from_scratch=True)
    model.pretrained.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    known = tokenizer.convert_tokens_to_ids("<eos>")
    before = model.pretrained.get_input_embeddings().weight[known].clone()
    add_special_tokens_(model, tokenizer)
    assert special_ids(tokenizer)[1] == known
    assert torch.equal(model.pretrained.get_input_embeddings().weight[known], before)


@pytest.mark.parametrize(
    ("added", "bos", "eos"),
    [
        ({}, "<|endoftext|>", "<|endoftext|>"),
        (
            {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None},
            "<|im_start|>",
            "<|im_end|>",
        ),
        (
            {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"], "bos_token": "<s>"},
            "<s>",
            "<end_of_turn>",
        ),
    ],
)
def test_control_tokens_are_found(base_checkpoints, added, bos, eos):
    tokenizer = load_tokenizer(base_checkpoints["llama"])
    if "bos_token" in added:
        tokenizer.bos_token = None
    tokenizer.add_special_tokens({name: value for name, value in added.items() if value})
    found = {token: tokenizer.convert_ids_to_tokens(source) for token, source in nearest_tokens(tokenizer).items()}
    assert found == {"<bos>": bos, "<eos>": eos, "<speaker1>": "Ċ", "<speaker2>": "Ċ"}


# Runs


@pytest.mark.parametrize("family", slow_but(["qwen2"], [*FAMILIES, *OTHERS]))
def test_a_resumed_run_is_an_uninterrupted_one(family, base_checkpoints, tmp_path):
    run = run_training(tmp_path, base_checkpoints[family], *FLAGS)
    weights, lines = weights_of(run), run.steps
    resume_from_the_first_epoch(run)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(run).items())
    assert [line["loss"] for line in run.steps] == [line["loss"] for line in lines] and len(lines) == 6


def test_a_llama_is_trained_measured_and_talked_to(base_checkpoints, tmp_path, monkeypatch, capsys):
    run = run_training(tmp_path, base_checkpoints["llama"], *FLAGS, "--eval_before_start", "--history_start", 30)
    assert run.validations[-1]["nll"] < run.validations[0]["nll"]
    assert json.loads((run.folder / "training_args.json").read_text())["token_types"] == "off"
    config = json.loads((run.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["token_types"], config["history_start"]) == (False, 30)
    assert isinstance(transformers.AutoModelForCausalLM.from_pretrained(run.folder), transformers.LlamaForCausalLM)
    figures = evaluate(run)
    assert figures["token_ppl"] == pytest.approx(run.validations[-1]["ppl"], rel=1e-4)
    assert figures["hits@1"] == pytest.approx(run.validations[-1]["accuracy"])
    assert len(replies_of(run, monkeypatch, capsys)) >= 3


def test_token_types_are_recorded(base_checkpoints, tmp_path):
    run = run_training(tmp_path, base_checkpoints["llama"], *FLAGS, "--token_types", "on")
    assert load_model(run.folder).token_types
    run = run_training(tmp_path / "again", run.folder, *FLAGS)
    assert load_model(run.folder).token_types
    with pytest.raises(SystemExit, match="2"):
        train(["--token_types", "maybe"])


def test_the_head_has_a_rate_of_its_own_and_rates_rise_at_first(base_checkpoints, tmp_path):
    flags = ["--lr", 0, "--head_lr", 0.1, "--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--n_epochs", 1]
    base = tmp_path / "base"
    base.mkdir()
    model = load_model(base_checkpoints["llama"], from_scratch=True)
    save_model(model, base)
    load_tokenizer(base_checkpoints["llama"]).save_pretrained(base)
    run = run_training(tmp_path, base, *flags)
    before = model.pretrained.state_dict()
    for name, tensor in weights_of(run).items():
        same = torch.equal(tensor[: len(before[name])], before[name])
        assert same == (not name.startswith("multiple_choice_head.")), name
    run = run_training(tmp_path, base, *FLAGS, "--warmup_steps", 4)
    assert [line["lr"] for line in run.steps] == [
        pytest.approx(0.01 * rise * (1 - step / 6)) for step, rise in enumerate((0.25, 0.5, 0.75, 1, 1, 1))
    ]


def test_a_share_of_the_dialogs_is_the_first_ones(base_checkpoints, tmp_path):
    run = run_training(tmp_path, base_checkpoints["llama"], *FLAGS, "--train_share", 0.5)
    assert f"train: {2 * len(DATASET['train'][:3])} examples" in run.log


# LoRA


@pytest.fixture(scope="module")
def bases(base_checkpoints, tmp_path_factory):
    """Checkpoints with weights, without the dialog tokens. GPT-NeoX's embeddings are not tied."""
    folders = {}
    for family in ("gpt", "gpt2", "llama", "gpt_neox"):
        folders[family] = tmp_path_factory.mktemp(f"{family}-base")
        torch.manual_seed(2)
        model = load_model(base_checkpoints[family], from_scratch=True)
        save_model(model, folders[family])
        load_tokenizer(base_checkpoints[family]).save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    """A run with an adapter."""
    pytest.importorskip("peft")
    return run_training(tmp_path_factory.mktemp("adapter"), bases["llama"], *FLAGS, "--lora_rank", 2)


@pytest.mark.parametrize("family", slow_but(["gpt"], ["gpt", "gpt2", "llama", "gpt_neox"]))
def test_an_adapter_is_trained_resumed_measured_and_merged(family, bases, tmp_path):
    pytest.importorskip("peft")
    lora = [*FLAGS, "--lora_rank", 2]
    run = run_training(tmp_path, bases[family], *lora, "--eval_before_start")
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"}
    assert not names & {"model.safetensors", "README.md"}
    assert run.validations[-1]["nll"] < run.validations[0]["nll"]
    weights = weights_of(run)
    resume_from_the_first_epoch(run)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(run).items())
    assert evaluate(run)["token_ppl"] == pytest.approx(run.validations[-1]["ppl"], rel=1e-4)

    adapted, tokenizer = load_finetuned(run.folder)
    base = load_model(bases[family]).pretrained
    rows, old = adapted.pretrained.get_input_embeddings().weight, base.get_input_embeddings().weight
    assert torch.equal(rows[: len(old)], old) and len(rows) == len(old) + len(SPECIAL_TOKENS)
    assert any("lora_B" in name and tensor.any() for name, tensor in weights.items())
    assert any("multiple_choice_head" in name and tensor.any() for name, tensor in weights.items())

    whole = run_training(tmp_path / "merged", bases[family], *lora, "--merge_lora")
    assert not (whole.folder / "adapter_config.json").exists()
    merged = load_model(whole.folder)
    tied = merged.pretrained.get_output_embeddings().weight is merged.pretrained.get_input_embeddings().weight
    assert tied == (family != "gpt_neox")
    batch = pack([make_fork(Example([[7, 8]], [[9, 10, 11]], [[12, 13], [14]]), tokenizer)], 0)
    with torch.inference_mode():
        for got, want in zip(merged(batch), adapted(batch)):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    transformers.AutoModelForCausalLM.from_pretrained(whole.folder)


def test_what_an_adapter_needs(bases, base_checkpoints, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="no weights there; train it first"):
        run_training(tmp_path, base_checkpoints["llama"], "--lora_rank", 2)
    base = bases["llama"].rename(tmp_path / "base")
    try:
        run = run_training(tmp_path, base, *FLAGS, "--lora_rank", 2)
        with pytest.raises(UserError, match=r"^--lora_rank 3: .* has an adapter of rank 2, which goes on without"):
            run_training(tmp_path, run.folder, *FLAGS, "--lora_rank", 3)
    finally:
        base.rename(bases["llama"])
    record = run.folder / "adapter_config.json"
    where = f"base_model_name_or_path of {record} says where that is"
    with pytest.raises(UserError, match=f"^{run.folder} adapts another model: .* {base}: no such folder; {where}$"):
        load_finetuned(run.folder)
    record.write_text(record.read_text().replace(str(base), str(bases["llama"])))
    load_finetuned(run.folder)
    (run.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config.json: no adapter's configuration$"):
        load_finetuned(run.folder)


def test_an_adapter_goes_on_beside_its_base_wherever_that_is_now(adapter, bases, tmp_path, caplog):
    """The base's path was compared: one that had been moved ended the run for good. Beside other weights it chatted
    without a word.
    """
    top = shutil.copytree(adapter.folder.parent.parent, tmp_path / "top")
    moved = shutil.copytree(bases["llama"], tmp_path / "moved")
    other = shutil.copytree(bases["llama"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: weights[name] + 1e-3}, other / "model.safetensors", metadata={"format": "pt"})
    resume = ["--resume", str(top / "runs" / adapter.folder.name), "--n_epochs", "3"]
    with process_as_it_was(), contextlib.chdir(top), contextlib.redirect_stderr(io.StringIO()):
        with pytest.raises(UserError, match=rf"^--resume: {other} is not the model that the run began with"):
            train([*resume, "--model", str(other)])
        folder = train([*resume, "--model", str(moved)])
    record = top / folder / "adapter_config.json"
    assert json.loads(record.read_text())["base_model_name_or_path"] == str(moved)
    caplog.clear()
    load_finetuned(top / folder)
    assert not caplog.messages
    record.write_text(record.read_text().replace(str(moved), str(other)))
    load_finetuned(top / folder)
    told = f"{top / folder} was trained beside other weights than {other} has now: expect other replies"
    assert caplog.messages == [told]


@pytest.mark.parametrize(("name", "changed"), [
    ("config.json", {"history_start": "85"}), ("config.json", {"vocab_size": 10**13}),
    ("adapter_config.json", {"r": 5}),
])  # fmt: skip
def test_a_damaged_adapter_is_one_line(adapter, tmp_path, name, changed):
    folder = shutil.copytree(adapter.folder, tmp_path / "run")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))
    with pytest.raises(UserError, match=f"^model_checkpoint {folder}: no usable adapter there") as error:
        load_finetuned(folder)
    assert "\n" not in str(error.value)


def test_training_goes_on_from_an_adapter_or_with_all_weights(adapter, bases, tmp_path):
    run = adapter
    longer = run_training(tmp_path, run.folder, *FLAGS, "--eval_before_start")
    assert longer.validations[0]["nll"] == pytest.approx(run.validations[-1]["nll"], rel=1e-5)
    assert weights_of(longer).keys() == weights_of(run).keys()
    resumed = run_training(tmp_path, run.folder, *FLAGS, "--n_epochs", 3, "--resume", "auto")
    assert resumed.folder == longer.folder

    whole = run_training(tmp_path, run.folder, *FLAGS, "--lora_rank", 0, "--eval_before_start")
    assert whole.validations[0]["nll"] == pytest.approx(run.validations[-1]["nll"], rel=1e-4)
    assert not (whole.folder / "adapter_config.json").exists()
    old, new = load_file(bases["llama"] / "model.safetensors"), weights_of(whole)
    assert all((tensor != new[name][: len(tensor)]).any() for name, tensor in old.items())


def test_a_package_that_is_missing():
    message = "lora_rank: needs nopackage; pip install -r requirements/extra.txt"
    with pytest.raises(SettingError, match=f"^{message}$") as error:
        require("lora_rank", "nopackage", "torch", setting="lora_rank")
    assert in_flags(error.value) == f"--{message}"


# What a model cannot do


def tiny_model(family: str, base_checkpoints, folder):
    """A checkpoint without weights, with GPT-2's kind of tokenizer."""
    tokenizer = load_tokenizer(base_checkpoints["llama"])
    tokenizer.save_pretrained(folder)
    tiny_config(family, len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("dbrx", ["--fp16", "bf16"], r"^--fp16 bf16: a dbrx model cannot be trained so \(.*\); leave it out$"),
        pytest.param(
            "ctrl",
            ["--gradient_checkpointing"],
            "^--gradient_checkpointing: a ctrl model cannot do it$",
            marks=pytest.mark.skipif(AS_IN_5_3, reason="transformers 5.3 has a CTRL that takes no mask of trees"),
        ),
    ],
)
def test_what_a_model_cannot_be_trained_with_is_said_at_once(base_checkpoints, tmp_path, family, flags, message):
    """It was a traceback of the first step."""
    with pytest.raises(UserError, match=message):
        run_training(tmp_path, tiny_model(family, base_checkpoints, tmp_path), *flags)
    assert not (tmp_path / "runs").exists()


def test_an_adapter_beside_a_bias_of_tied_embeddings_is_refused(base_checkpoints, tmp_path):
    """peft would part the two embeddings, and the model be loaded with one of them."""
    pytest.importorskip("peft")
    folder = tiny_model("ctrl", base_checkpoints, tmp_path)
    save_model(load_model(folder, from_scratch=True), folder)
    with pytest.raises(UserError, match=r"^--lora_rank 2: a ctrl model, whose output layer has a bias"):
        run_training(tmp_path, folder, "--lora_rank", 2)


def test_a_model_that_does_not_run_in_bfloat16_is_refused_so(base_checkpoints, tmp_path):
    folder = tiny_model("xglm", base_checkpoints, tmp_path)
    model, tokenizer = load_model(folder, from_scratch=True), load_tokenizer(folder)
    add_special_tokens_(model, tokenizer)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    load_finetuned(str(folder))
    with pytest.raises(UserError, match=r"^fp16 bf16: a xglm model does not run in it \(.*\); leave it out$"):
        load_finetuned(str(folder), fp16="bf16")


def test_positions_that_leave_out_the_pad_id_stay_as_they_are(base_checkpoints, tmp_path):
    """XGLM's has to be one of its positions. That of the dialog tokens was none, and no run could be loaded."""
    run = run_training(tmp_path, tiny_model("xglm", base_checkpoints, tmp_path), *FLAGS[:-1], 1)
    assert len(run.steps) == 3
    model, tokenizer = load_finetuned(str(run.folder))
    assert model.n_positions < tokenizer.pad_token_id == model.pretrained.generation_config.pad_token_id
    assert evaluate(run)["token_ppl"] == pytest.approx(run.validations[-1]["ppl"], rel=1e-4)
    check_loss(model, tokenizer, run.folder)


# Tokenizers


def test_a_model_without_a_tokenizer(bases, tmp_path):
    shutil.copy(bases["llama"] / "config.json", tmp_path)
    with pytest.raises(UserError, match=f"^model_checkpoint {tmp_path}: no .*tokenizer there"):
        load_tokenizer(tmp_path)


def sentencepiece_like(texts: list[str], first: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose pieces carry the space as a sign, like Llama 2's; `first`: at a text's beginning too."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    sign = normalizers.Replace(" ", "▁")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), sign]) if first else sign
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.mark.parametrize("kind", ["gpt", "gpt2", "sign everywhere", "sign between"])
def test_first_pieces_are_those_of_the_words_where_they_stand(kind, checkpoints, example_json):
    texts = [" ".join(split_words(sentence)) for dialog in example_json["valid"] for sentence in dialog["personality"]]
    if kind in checkpoints:
        tokenizer = load_tokenizer(checkpoints[kind])
    else:
        tokenizer = sentencepiece_like(texts, first=kind == "sign everywhere")
    counts = {word: 1 for text in texts for word in text.split()}
    scorer = LabelScorer(tokenizer, counts)
    assert (scorer.later is scorer.first) == (kind in ("gpt", "sign everywhere"))
    place = {word: i for i, word in enumerate(counts)}
    for text in texts[:20] if kind != "gpt" else ():  # whose words are looked up whole, as "don't", though they split
        words = text.split()
        for i, word in enumerate(words):
            before, after = tokenize(tokenizer, [" ".join(words[:i]), " ".join(words[: i + 1])])
            assert after[: len(before)] == before
            assert (scorer.later if i else scorer.first).first[place[word]] == after[len(before)], (text, word)


# GGUF files


def write_gguf(path, tokenizer, model: torch.nn.Module) -> None:
    """A tiny Llama as llama.cpp keeps it."""
    from gguf import GGUFWriter

    config, state = model.config, model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(bpe["vocab"]))
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in bpe["vocab"]])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    for name, tensor in state.items():
        _, *parts, _ = name.split(".")
        block = f"blk.{parts[1]}." if parts[:1] == ["layers"] else ""
        key = ".".join(parts[2:] if block else parts)
        if key not in names:
            continue  # the tied head and the choice head
        if key.endswith(("q_proj", "k_proj")):  # llama.cpp turns neighbouring pairs, transformers halves
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{block}{names[key]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_that_was_written(bases, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("TRANSFERTRANSFO_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    model, tokenizer = load_model(bases["llama"]), load_tokenizer(bases["llama"])
    write_gguf(file, tokenizer, model.pretrained)
    texts = ["i like tea .", "<|endoftext|> <s> hi", ""]
    assert tokenize(load_tokenizer(file), texts) == tokenize(tokenizer, texts)
    state = load_model(file).pretrained.state_dict()
    assert "de-quantizing" not in capsys.readouterr().err, "a bar where there is no terminal"
    for name, tensor in model.pretrained.state_dict().items():
        torch.testing.assert_close(state[name], tensor, msg=name)
    run = run_training(tmp_path, file, *FLAGS, "--eval_before_start")
    assert "quantization_config" not in json.loads((run.folder / "config.json").read_text())
    assert run.validations[-1]["nll"] < run.validations[0]["nll"]
    assert evaluate(run)["token_ppl"] == pytest.approx(run.validations[-1]["ppl"], rel=1e-4)


def test_gguf_files_that_cannot_be_read(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    damaged = tmp_path / "weights_of_a_package" / "model.gguf"
    damaged.parent.mkdir()
    damaged.write_bytes(b"GGUF of a kind")
    monkeypatch.syspath_prepend(tmp_path)
    for path in (damaged, "weights_of_a_package/model.gguf"):  # the package's name stands for its folder
        with pytest.raises(UserError, match=f"^model_checkpoint {path}: no usable GGUF header there "):
            load_tokenizer(path)
    for path in (tmp_path / "none.gguf", "none/none.gguf", "weights_of_a_package/none.gguf"):
        with pytest.raises(UserError, match=f"^model_checkpoint {path}: no such file, neither here nor in an inst"):
            load_model(path)

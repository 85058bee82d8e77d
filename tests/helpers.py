"""What several test modules share: the tree, small datasets, and a training run as a function call."""

import contextlib
import copy
import csv
import functools
import io
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from train import train
from transfertransfo.cli import run_script
from transfertransfo.decoding import Decoding
from transfertransfo.evaluation import samples
from transfertransfo.model.double_heads import DoubleHeads, add_adapter_, add_special_tokens_
from transfertransfo.model.loading import load_model
from transfertransfo.model.saving import save_model
from transfertransfo.model.sources import load_tokenizer

ROOT = Path(__file__).parent.parent
FAMILIES = ("gpt", "gpt2")
OTHERS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gpt_neox": GPTNeoXConfig}  # with GPT-2's kind of tokenizer
AS_IN_5_3 = transformers.__version__.startswith("5.3.")  # the oldest that works, with faults of its own
ANSWERS = ["i like tea .", "i have two dogs .", "no , never .", "yes , i do !", "hello !", "we live in a big house ."]
QUESTIONS = ["what do you like ?", "any pets ?", "did you go there ?", "do you cook ?", "hi !", "where do you live ?"]


def slow_but(kept: Collection, values: Iterable) -> list:
    """Values of a test's parameter, all marked slow but for those kept, one of each kind."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


# GPT-2 takes what GPT takes. Qwen2 is a Llama with biases, and has more embeddings than tokens here.
EVERY_FAMILY = slow_but(("gpt", "qwen2"), (*FAMILIES, *OTHERS))


def tiny_config(family: str, vocab_size: int, **more) -> PretrainedConfig:
    """A model of two layers, of width 16, of one of many families."""
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    gpt = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 128}
    llama = {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16,
        "intermediate_size": 32, "max_position_embeddings": 128,
    }  # fmt: skip
    tied = llama | {"tie_word_embeddings": True}
    # of two layers, one looks back over a window
    window = llama | {"head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    opt = {
        "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 8,
        "max_position_embeddings": 128,
    }  # fmt: skip
    tower = {
        "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    routed = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    if family == "gemma3":  # reads images too
        text = window | tokens | {"vocab_size": vocab_size}
        image = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
        return transformers.Gemma3Config(text_config=text | more, vision_config=tower, **image)
    if family == "gemma4":  # reads images and hears too
        text = tiny_config("gemma4_text", vocab_size, **more)
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
        image = sizes | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16, "patch_size": 4}
        kinds = transformers.Gemma4VisionConfig(**image), transformers.Gemma4AudioConfig(**sizes)
        ids = dict.fromkeys(("image_token_id", "boi_token_id", "eoi_token_id", "audio_token_id", "boa_token_id"), 5)
        return transformers.Gemma4Config(text_config=text, vision_config=kinds[0], audio_config=kinds[1], **ids)
    kind, shape = {
        "gpt": (transformers.OpenAIGPTConfig, gpt),
        "gpt2": (transformers.GPT2Config, gpt),
        "llama": (LlamaConfig, tied),
        "qwen2": (Qwen2Config, tied),
        "gpt_neox": (GPTNeoXConfig, llama),
        "opt": (transformers.OPTConfig, opt),
        "mistral": (transformers.MistralConfig, llama | {"sliding_window": 64}),
        "gemma2": (transformers.Gemma2Config, window),
        "phi": (transformers.PhiConfig, llama | {"num_key_value_heads": 4}),
        "ctrl": (transformers.CTRLConfig, gpt | {"dff": 32}),
        "gptj": (transformers.GPTJConfig, gpt | {"rotary_dim": 4}),
        "codegen": (transformers.CodeGenConfig, gpt | {"rotary_dim": 4, "n_head": 4}),
        "qwen3": (transformers.Qwen3Config, llama | {"head_dim": 8}),
        "phi3": (transformers.Phi3Config, llama | {"sliding_window": 64}),
        "smollm3": (transformers.SmolLM3Config, llama),
        "olmo2": (transformers.Olmo2Config, llama),
        "olmo3": (transformers.Olmo3Config, llama | {"sliding_window": 64}),
        "exaone4": (transformers.Exaone4Config, llama | {"sliding_window": 64, "sliding_window_pattern": 2}),
        "starcoder2": (transformers.Starcoder2Config, llama | {"sliding_window": 64}),
        "mixtral": (transformers.MixtralConfig, llama | experts | {"sliding_window": 64}),
        "gemma4_text": (
            getattr(transformers, "Gemma4TextConfig", None),  # not in the oldest that works
            window | {"vocab_size_per_layer_input": vocab_size, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
        ),
        "falcon": (transformers.FalconConfig, llama | {"new_decoder_architecture": True, "num_kv_heads": 2}),
        "falcon_alibi": (transformers.FalconConfig, llama | {"alibi": True}),
        "qwen3_5_text": (
            getattr(transformers, "Qwen3_5TextConfig", None),  # not in the oldest that works
            llama
            | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
            | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
            | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        ),
        "llama4_text": (transformers.Llama4TextConfig, llama | experts | {"head_dim": 4, "intermediate_size_mlp": 32}),
        "mamba": (transformers.MambaConfig, {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
        "bloom": (transformers.BloomConfig, {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
        "mpt": (transformers.MptConfig, {"d_model": 16, "n_layers": 2, "n_heads": 2}),
        "gpt_neo": (
            transformers.GPTNeoConfig,
            {
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["global", "local"], 1]],
                "max_position_embeddings": 400,
                "window_size": 256,
            },
        ),
        "dbrx": (
            transformers.DbrxConfig,
            {
                "d_model": 16,
                "n_heads": 2,
                "n_layers": 2,
                "max_seq_len": 128,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
            },
        ),
        "xglm": (
            transformers.XGLMConfig,
            # fewer positions than tokens, as XGLM-564M has
            {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32, "max_position_embeddings": 200},
        ),
        "phimoe": (transformers.PhimoeConfig, llama | experts),
        "granitemoe": (transformers.GraniteMoeConfig, llama | experts | {"logits_scaling": 3.0}),
        "cohere": (transformers.CohereConfig, llama),
        "cohere2": (transformers.Cohere2Config, window),
        "granite": (transformers.GraniteConfig, llama | {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),
        "gemma3_text": (transformers.Gemma3TextConfig, window),
        "gpt_oss": (transformers.GptOssConfig, window | experts),
        "deepseek_v3": (
            transformers.DeepseekV3Config,
            llama | latent | routed | {"num_key_value_heads": 4, "moe_intermediate_size": 8, "n_shared_experts": 1},
        ),
    }[family]
    return kind(**{"vocab_size": vocab_size, **shape, **tokens, **more})


def write_tokenizer(family: str, texts: Sequence[str], folder: Path) -> None:
    """Write a tokenizer of some hundred tokens: GPT's kind for GPT, GPT-2's for all others."""
    tokenizer = train_tokenizer(family == "gpt", tuple(texts))
    state = json.loads(tokenizer.to_str())["model"]
    kind = transformers.OpenAIGPTTokenizer if family == "gpt" else transformers.GPT2Tokenizer
    kind(vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]]).save_pretrained(folder)


@functools.cache
def train_tokenizer(of_gpt: bool, texts: tuple[str, ...]) -> Tokenizer:
    if of_gpt:
        bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.BertNormalizer(lowercase=True)
        bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        options = {"vocab_size": 300, "special_tokens": ["<unk>"], "end_of_word_suffix": "</w>"}
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = {"vocab_size": 400, "special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **options))
    return bpe


def dialog(number: int, turns: int = 2) -> dict:
    """A dialog whose replies answer its questions; each reply has two distractors."""
    utterances, history = [], []
    for turn in range(number, number + turns):
        history = [*history, QUESTIONS[turn % 6]]
        candidates = [ANSWERS[(turn + shift) % 6] for shift in (2, 3, 0)]
        utterances.append({"candidates": candidates, "history": history})
        history = [*history, candidates[-1]]
    return {"personality": [ANSWERS[number % 6], ANSWERS[(number + 1) % 6]], "utterances": utterances}


DATASET = {"train": [dialog(i) for i in range(6)], "valid": [dialog(i, turns=3) for i in (0, 3)]}


@dataclass
class Run:
    """A run folder, what the run logged, and its figures."""

    folder: Path
    log: str

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict]:
        return [line for line in self.lines if "split" not in line]

    @property
    def validations(self) -> list[dict]:
        return [line for line in self.lines if "split" in line]


@contextlib.contextmanager
def process_as_it_was():
    """A script sets up the process's log and its signals; here that ends with the block."""
    root, names = logging.getLogger(), (signal.SIGINT, signal.SIGTERM)
    level, handlers, signals = root.level, root.handlers[:], [signal.getsignal(name) for name in names]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        for name, handler in zip(names, signals):
            signal.signal(name, handler)


REPLIES = Decoding(no_sample=True, max_length=4)  # after each validation; whole ones take a quarter of a run's time


def run_training(folder: Path, checkpoint: Path, *flags, dataset: dict = DATASET) -> Run:
    """Train in `folder` on a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(dataset))
    argv = ["--model_checkpoint", checkpoint, "--dataset_path", "dataset.json", "--device", "cpu", *flags]
    short = mock.patch.object(samples, "DECODING", REPLIES)
    with short, process_as_it_was(), contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()) as log:
        run_folder = train([str(argument) for argument in argv])
    return Run(folder / run_folder, log.getvalue())


def run_processes(count: int, cwd: Path, script: Callable, argv: list) -> list[int]:
    """Run a script's entry function in processes that find one another as a launcher's do, each with one thread.

    They are forks of this one, which start at once. What they say is in `cwd` as `log0`, `log1`, ...

    Returns:
        Their exit statuses.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_run_launched, args=(rank, count, port, cwd, script, list(map(str, argv))))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _run_launched(rank: int, count: int, port: int, cwd: Path, script: Callable, argv: list[str]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(cwd / f"log{rank}", "w"))
        os.dup2(log.fileno(), 2)
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(log))
        stack.enter_context(contextlib.chdir(cwd))
        run_script(lambda: script(argv))


def start_fork(script: Callable, argv: list, fds: Sequence[int], encoding: str = "utf-8", **environment: str):
    """Start a script's entry function as a shell does, in a fork of this process: a new one imports for seconds.

    Args:
        fds: what becomes its standard input, output and error stream.

    Returns:
        The `multiprocessing.Process`, the leader of a process group of its own.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_run_on, args=(script, list(map(str, argv)), fds, encoding, environment)
    )
    process.start()
    return process


def _run_on(script: Callable, argv: list[str], fds: Sequence[int], encoding: str, environment: dict[str, str]) -> None:
    os.setpgid(0, 0)
    os.environ |= environment
    for target, source in enumerate(fds):
        os.dup2(source, target)
    sys.stdin = open(0, encoding=encoding)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, encoding=encoding) for fd in (1, 2))  # noqa: SIM115
    run_script(lambda: script(argv))


def load_own(checkpoint: Path, load: Callable = load_model):
    """A model that the caller may change. To load and check one takes a tenth of a second: that is done once for each.

    The folder must stay as it is, as those of session and module fixtures do.
    """
    return copy.deepcopy(_load_once(checkpoint, load))


@functools.lru_cache(maxsize=32)
def _load_once(checkpoint: Path, load: Callable):
    return load(checkpoint)


def dialogs_of_text(dataset: dict) -> list[str]:
    """Every text of a PersonaChat JSON, repeated as often as it occurs."""
    utterances = [utterance for dialogs in dataset.values() for dialog in dialogs for utterance in dialog["utterances"]]
    return [text for utterance in utterances for name in ("candidates", "history") for text in utterance[name]]


def draw_(model: DoubleHeads, seed: int) -> None:
    """Draw what is trained at a scale that shows in each figure."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)


def make_base(folder: Path, checkpoints: dict[str, Path], family: str, **more) -> Path:
    """A folder with a tiny model of a family: weights at which each part matters, without the dialog tokens."""
    tokenizer = load_tokenizer(checkpoints["gpt" if family == "gpt" else "gpt2"])
    tiny_config(family, len(tokenizer), **more).save_pretrained(folder)
    model = load_model(folder, from_scratch=True)
    draw_(model, seed=1)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapt(base: Path):
    """The base with an adapter that has been trained on something, without dropout, and its tokenizer."""
    model, tokenizer = load_model(base), load_tokenizer(base)
    add_special_tokens_(model, tokenizer)
    add_adapter_(model, tokenizer, rank=2, base=str(base))
    draw_(model, seed=2)
    return model.eval(), tokenizer


# Small invented datasets


def lines(*records) -> str:
    """JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def turns(dialog) -> list:
    """History and gold reply of each utterance."""
    return [(utterance["history"], utterance["candidates"][-1]) for utterance in dialog["utterances"]]


def table(rows, delimiter=",") -> str:
    """CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

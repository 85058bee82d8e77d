"""The memory that a training step is said to need is what it takes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import DATASET, adapt, make_base, run_training, tiny_config
from ignite.engine import Events
from safetensors.torch import load_file
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.functional import cross_entropy

import train
from transfertransfo.data.inputs import Example
from transfertransfo.data.trees import Fork, pack
from transfertransfo.errors import UserError
from transfertransfo.model.double_heads import DoubleHeads, enable_gradient_checkpointing_, halve_frozen_
from transfertransfo.model.heads import double_heads_class
from transfertransfo.training.engines import Optimisation, create_trainer, make_adamw
from transfertransfo.training.loaders import make_loader, pack_examples
from transfertransfo.training.memory import estimate_memory, largest_batch
from transfertransfo.training.precision import make_precision

CPU = torch.device("cpu")
OPTIMISATION = Optimisation(lr=1e-3, head_lr=None, warmup_steps=0, gradient_accumulation_steps=1, lm_coef=1.0,
                            mc_coef=1.0, label_smoothing=0.0, max_norm=1.0)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "level", "micro_steps", "checkpointing"),
    [
        pytest.param("gpt", "", 1, False, marks=pytest.mark.slow),
        ("gpt", "bf16", 1, False),
        ("gpt2", "", 1, True),
        pytest.param("llama", "", 2, False, marks=pytest.mark.slow),
    ],
)
def test_a_step_needs_what_is_estimated(family, level, micro_steps, checkpointing):
    """Within 15 %, as torch's tracker counts the tensors that are there at once; no parameter is copied for it."""
    config = tiny_config(family, 400)
    model = DoubleHeads(double_heads_class(config)(config)).train()
    model.additive_mask = family == "llama"
    batch = make_batch()
    half = torch.bfloat16 if level else None
    memory = estimate_memory(
        model, batch, CPU, half=half, micro_steps=micro_steps, n_processes=1, sharded=False, checkpointing=checkpointing
    )
    if checkpointing:
        enable_gradient_checkpointing_(model)
    names = [name for name, _ in model.named_parameters()]
    precision = make_precision(level, model, partial(make_adamw, names=names, lr=1e-3), CPU)
    optimisation = replace(OPTIMISATION, gradient_accumulation_steps=micro_steps)
    trainer = create_trainer(model, precision, optimisation, CPU)
    tracker = MemTracker()
    tracker.track_external(model, precision.optimizer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: tracker.reset_mod_stats())
    with tracker:
        trainer.run([batch] * 2 * micro_steps, max_epochs=1)
    peak = tracker.get_tracker_snapshot("peak")[CPU]
    (measured,) = (size for kind, size in peak.items() if "Total" in str(kind))
    assert memory.peak == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_adapters_over_halved_weights_need_what_is_estimated(base_checkpoints, tmp_path):
    """Autocast makes no copies of these weights, which the backward would keep."""
    pytest.importorskip("peft", reason="needs requirements/extra.txt")
    model, _ = adapt(make_base(tmp_path, base_checkpoints, "llama", hidden_size=64, intermediate_size=256))
    batch, sizes, kept = make_batch(), [], {}
    for halve in (False, True):
        if halve:
            halve_frozen_(model)
        memory = estimate_memory(
            model, batch, CPU, half=torch.bfloat16, micro_steps=1, n_processes=1, sharded=False, checkpointing=False
        )
        sizes.append((memory.parameters, memory.activations))

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        logits, scores = model.train()(batch)
        losses = [cross_entropy(logits.float(), batch.lm_labels), cross_entropy(scores.float(), batch.choice_labels)]
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + 2 * logits.numel() * 4
    assert sizes[1][1] == pytest.approx(measured, rel=0.05) and len(losses) == 2
    halved = sum(p.nbytes for p in model.parameters() if p.dtype == torch.bfloat16)
    assert halved > 100_000 and sizes[0][0] - sizes[1][0] == halved == sizes[0][1] - sizes[1][1]


def test_the_batch_that_takes_most_room(gpt):
    """Many short rows can take more than few long ones."""
    short, long = (Example([[5] * size], [[6]], [[7], [8]]) for size in (20, 90))
    trees = [[short]] * 40 + [[long] * 8] * 2
    collate = partial(pack_examples, tokenizer=gpt, history_start=0, multiple=1, filler=short)
    loader, sampler = make_loader(trees, collate, batch_size=8, shuffle=True, seed=1)
    sizes = [batch.input_ids.numel() for batch in loader]
    largest = largest_batch(loader).input_ids
    assert largest.numel() == max(sizes) and largest.size(1) < sampler.lengths.max()


def make_batch():
    forks = [Fork([5] * 90, [1] * 90, [*range(90)], [[i] * 20, [9] * 20], 1) for i in range(4)]
    return pack(forks, 0)


@pytest.fixture
def not_small(monkeypatch):
    monkeypatch.setattr(train, "SMALL", 0)


def test_memory_is_told_before_the_first_step(base_checkpoints, tmp_path, monkeypatch, not_small):
    """With what helps where there is not as much."""
    monkeypatch.setattr(train, "free_memory", lambda device: 1000)
    log = run_training(tmp_path, base_checkpoints["gpt"], "--n_epochs", 1, "--fp16", "bf16").log
    assert log.index("Memory: about 0.00 GB a device (parameters 0.00, ") < log.index("Training: ")
    assert "0.00 GB are free: a step will hardly fit. What helps: --train_batch_size 2 --gradient_acc" in log
    assert "--gradient_accumulation_steps 16; --gradient_checkpointing; torchrun with --sharded; --lora_rank 16" in log


def test_the_estimate_leaves_adapters_as_they_are(base_checkpoints, tmp_path, monkeypatch):
    """The dialog tokens' embeddings had no values any more where those of input and output are tied."""
    pytest.importorskip("peft", reason="needs requirements/extra.txt")
    base = make_base(tmp_path / "base", base_checkpoints, "gpt2")
    runs = []
    for small in (train.SMALL, 0):
        monkeypatch.setattr(train, "SMALL", small)
        runs.append(run_training(tmp_path, base, "--n_epochs", 1, "--lora_rank", 2))
    without, told = (load_file(run.folder / "adapter_model.safetensors") for run in runs)
    assert "Memory: " in runs[1].log and told.keys() == without.keys()
    assert all(torch.equal(told[name], without[name]) for name in told)


def test_a_device_that_is_full_is_told_so(base_checkpoints, tmp_path, monkeypatch, not_small):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("transfertransfo.training.engines.distributed_losses", fill)
    with pytest.raises(UserError, match=r"^out of memory: a step needs about .* GB a device .*; what helps: --train_b"):
        run_training(tmp_path, base_checkpoints["gpt"], dataset=DATASET)

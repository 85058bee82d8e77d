"""Train, measure and talk to a tiny model of each family, and write what works into the table of docs/models.md.

    python tests/families.py                # all families
    python tests/families.py llama qwen3    # these alone, printed and not written

A model has two layers and random weights. "yes" means: three steps of training through `train.py`, the exported folder
gives in transformers the loss that it has here, `convai_evaluation.py` measures it, and it answers, greedily and by
beams.
"""

import contextlib
import io
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from helpers import dialogs_of_text, process_as_it_was, run_training, tiny_config, write_tokenizer  # noqa: E402

import convai_evaluation  # noqa: E402
from transfertransfo.data.inputs import Example, make_fork  # noqa: E402
from transfertransfo.data.trees import pack  # noqa: E402
from transfertransfo.decoding import Context, Decoding, generate  # noqa: E402
from transfertransfo.errors import UserError  # noqa: E402
from transfertransfo.model.double_heads import DoubleHeads  # noqa: E402
from transfertransfo.model.loading import load_finetuned, load_model  # noqa: E402
from transfertransfo.model.saving import save_model  # noqa: E402

TABLE = ROOT / "docs" / "models.md"
BEGIN, END = "| family | ", "\n\n"
MOST_USED = ("gpt", "gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox", "opt")
FAMILIES = (
    *MOST_USED, "gemma2", "gemma4_text", "gpt_oss", "smollm3", "olmo2", "olmo3", "exaone4", "mixtral", "phimoe", "phi",
    "deepseek_v3", "dbrx", "cohere", "cohere2", "granite", "granitemoe", "starcoder2", "gptj", "codegen", "falcon",
    "xglm", "ctrl", "falcon_alibi", "bloom", "mpt", "gpt_neo", "llama4_text", "qwen3_5_text", "mamba",
)  # fmt: skip
ALIBI = "ALiBi: attention by distances in the row"
WHY_NOT = {
    "dbrx": "does not mix number types",
    "falcon": "linear layers of its own class, which get no adapters",
    "xglm": "does not mix number types",
    "ctrl": "a bias beside tied embeddings, which peft would part; no checkpointing",
    "falcon_alibi": ALIBI,
    "bloom": ALIBI,
    "mpt": ALIBI,
    "gpt_neo": "local attention by distances in the row, in every other layer",
    "llama4_text": "chunks and temperature of attention by places in the row",
    "qwen3_5_text": "linear attention, through the row in order",
    "mamba": "a state, through the row in order",
}
COLUMNS = {
    "as it is": [],
    "`--lora_rank`": ["--lora_rank", "2"],
    "`--fp16 bf16`": ["--fp16", "bf16"],
    "`--gradient_checkpointing`": ["--gradient_checkpointing"],
}
FLAGS = ["--n_epochs", "1", "--train_batch_size", "4", "--gradient_accumulation_steps", "1"]  # of 12 examples: 3 steps


def make_base(family: str, folder: Path) -> Path:
    """A folder with a model of random weights at which each part matters, without the dialog tokens."""
    texts = dialogs_of_text(json.loads((ROOT / "example" / "personachat.json").read_text()))
    write_tokenizer(family, texts, folder)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    tiny_config(family, size).save_pretrained(folder)
    model = load_model(folder, from_scratch=True)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model(model, folder)
    return folder


@torch.inference_mode()
def check_loss(model: DoubleHeads, tokenizer, folder: Path) -> None:
    """Compare the logits of a reply in a tree with those of its sequence alone in transformers."""
    turns = [[*range(20, 60)], [*range(60, 100)]]
    fork = make_fork(Example([[7, 8], [9]], turns, [[12, 13], [14, 15, 16]]), tokenizer)
    logits, _ = model(pack([fork], tokenizer.pad_token_id))
    reply, start = fork.replies[fork.lm_reply], len(fork.context)
    types = torch.tensor([[*fork.token_types, *[fork.token_types[-1]] * len(reply)]])
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = {"token_type_ids": types} if model.token_types else {}
    want = alone(input_ids=torch.tensor([fork.context + reply]), **inputs).logits[0, start - 1 : -1]
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


def try_flags(family: str, flags: list[str], base: Path, top: Path) -> None:
    """Train, export, measure and talk.

    Raises:
        Exception: whatever does not work.
    """
    run = run_training(top, base, *FLAGS, *flags)
    assert len(run.steps) == 3
    model, tokenizer = load_finetuned(str(run.folder), fp16="bf16" if "bf16" in flags else "")
    if not flags:
        check_loss(model, tokenizer, run.folder)
    for decoding in (Decoding(no_sample=True, max_length=4), Decoding(num_beams=2, max_length=4)):
        generate(model, [Context([[7, 8]], [[9]])], tokenizer, decoding)
    arguments = ["--eval_type", "all", "--no_sample", "--model_checkpoint", run.folder, "--dataset_cache", "",
                 "--dataset_path", top / "dataset.json", *(flags if "bf16" in flags else [])]  # fmt: skip
    convai_evaluation.run([str(argument) for argument in arguments])


def outcome(attempt: Callable[[], object]) -> str:
    """ "yes", or "no" where it is refused in a line. Anything else is raised."""
    with process_as_it_was(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        logging.getLogger("transformers").setLevel(logging.CRITICAL)
        try:
            attempt()
        except UserError as error:
            logging.getLogger(__name__).debug("%s", error)
            return "no"
    return "yes"


def row_of(family: str) -> list[str]:
    """A family's row of the table."""
    cells = [family]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name, family)
        base.mkdir()
        none = [family, *["no"] * len(COLUMNS), WHY_NOT.get(family, "")]
        if outcome(lambda: make_base(family, base)) == "no":
            return none
        for number, flags in enumerate(COLUMNS.values()):
            top = Path(name, str(number))
            cells.append(outcome(lambda flags=flags, top=top: try_flags(family, flags, base, top)))
            if cells[1] == "no":
                return none
    return [*cells, WHY_NOT.get(family, "")]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rows_in_docs() -> dict[str, str]:
    """The lines of the table in docs by family."""
    return {found[1]: found[0] for found in re.finditer(r"^\| (\w+) \| (?:yes|no) .*\|$", TABLE.read_text(), re.M)}


def main() -> None:
    torch.set_num_threads(1)
    families = sys.argv[1:] or FAMILIES
    lines = [line(["family", *COLUMNS, "why not"]), line(["---"] * (2 + len(COLUMNS)))]
    print("\n".join(lines))
    for family in families:
        lines.append(line(row_of(family)))
        print(lines[-1], flush=True)
    if not sys.argv[1:]:
        text = TABLE.read_text()
        start = text.index(BEGIN)
        TABLE.write_text(text[:start] + "\n".join(lines) + text[text.index(END, start) :])


if __name__ == "__main__":
    main()

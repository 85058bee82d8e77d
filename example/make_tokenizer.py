"""Train the example model's tokenizer on the training texts of a dataset.

python example/make_tokenizer.py DATASET FOLDER

The same texts give the same files.
"""

import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import spacy
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import OpenAIGPTTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from transfertransfo.cli import ArgumentParser, run_script
from transfertransfo.data.dataset import read_training_dialogs

VOCAB_SIZE = 8000
CHARACTERS = sorted(set((string.ascii_letters + string.digits + string.punctuation).lower()))


def read_texts(dialogs: list[dict]) -> list[str]:
    """Each distinct sentence of the dialogs, sorted."""
    texts = set()
    for dialog in dialogs:
        texts.update(dialog["personality"])
        for turn in dialog["utterances"]:
            texts.update(turn["candidates"] + turn["history"])
    return sorted(texts)


def split_both_ways(texts: list[str]) -> Iterator[str]:
    """Words between spaces, as spaCy cuts them ("do n't") and as transformers' own tokenizer does ("don ' t")."""
    nlp, basic = spacy.blank("en"), pre_tokenizers.BertPreTokenizer()
    for text in map(str.lower, texts):
        yield " ".join(token.text for token in nlp(text))
        yield " ".join(word for word, _ in basic.pre_tokenize_str(text))


def train_tokenizer(texts: list[str]) -> OpenAIGPTTokenizer:
    """A GPT tokenizer that has every printable ASCII character, alone and at a word's end: no ASCII text is unknown."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.BertNormalizer(lowercase=True)
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # "special" only to this trainer, where it means a fixed place at the head of the vocabulary
    head = ["<unk>", *CHARACTERS, *(character + "</w>" for character in CHARACTERS)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=head, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(split_both_ways(texts), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return OpenAIGPTTokenizer(
        vocab=model["vocab"],
        merges=merges,  # type: ignore[arg-type]  # pairs, as tokenizers' BPE takes them
        gpt_tokenization="spacy",
    )


def main() -> None:
    parser = ArgumentParser("Train the example model's tokenizer on the training texts of a dataset.")
    parser.add_argument("dataset", help="dataset: a file, a folder or a URL")
    parser.add_argument("folder", help="folder to write the tokenizer's files to")
    args = parser.parse_args()
    train_tokenizer(read_texts(read_training_dialogs(args.dataset))).save_pretrained(args.folder)


if __name__ == "__main__":
    run_script(main)

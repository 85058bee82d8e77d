"""Train the example model's tokenizer on the example's texts: `python example/make_tokenizer.py [FOLDER]`.

The same texts give the same files. FOLDER is where they go, example/model unless given.
"""

import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import spacy
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import OpenAIGPTTokenizer

EXAMPLE = Path(__file__).parent
VOCAB_SIZE = 2000
CHARACTERS = sorted(set((string.ascii_letters + string.digits + string.punctuation).lower()))


def read_texts(dataset: dict) -> list[str]:
    """Each distinct sentence of the dataset, sorted."""
    texts = set()
    for dialog in dataset["train"] + dataset["valid"]:
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
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=head, end_of_word_suffix="</w>",
                                  show_progress=False)
    bpe.train_from_iterator(split_both_ways(texts), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return OpenAIGPTTokenizer(vocab=model["vocab"], merges=merges, gpt_tokenization="spacy")


if __name__ == "__main__":
    dataset = json.loads((EXAMPLE / "personachat.json").read_text(encoding="utf-8"))
    train_tokenizer(read_texts(dataset)).save_pretrained(sys.argv[1] if len(sys.argv) > 1 else EXAMPLE / "model")

"""Text -> token ids, many texts at once, and for GPT as in its own pre-training."""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ["<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>"]
ATTR_TO_SPECIAL_TOKEN: dict[str, Any] = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<speaker1>", "<speaker2>"],
}


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens: one written in the text, as `<eos>`, stays text."""
    if tokenizer.init_kwargs.get("gpt_tokenization") == "spacy":
        return _tokenize_with_spacy(tokenizer, texts)
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [
            encoding.ids
            for chunk in _chunks(texts)
            for encoding in backend.encode_batch_fast(chunk, add_special_tokens=False)
        ]
    finally:
        backend.encode_special_tokens = before


def _tokenize_with_spacy(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """GPT's own pre-processing: text mended by ftfy, split by spaCy's English tokenizer, lower-cased, then BPE."""
    import ftfy  # optional for GPT-2, and a second of start-up
    from tokenizers import Tokenizer

    words_of = _spacy_words()
    words_to_ids = Tokenizer(tokenizer.backend_tokenizer.model)  # the BPE alone: words are split already
    return [
        encoding.ids
        for chunk in _chunks(texts)
        for encoding in words_to_ids.encode_batch_fast(
            [[word.text.lower() for word in words_of(_standardize(ftfy.fix_text(text)))] for text in chunk],
            is_pretokenized=True,
        )
    ]


@functools.cache
def _spacy_words() -> Callable[[str], Iterable]:
    """spaCy's English tokenizer, which takes 0.2 s to make."""
    import spacy

    return spacy.blank("en").tokenizer


_DASHES_AND_SIGNS = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
_PUNCTUATION_RUN = re.compile(r"([-~!\";?+,)(\\/*\[\]}{|_])\1*")


def _standardize(text: str) -> str:
    """Text as GPT's pre-training spaced it before spaCy: one sign for variants, space around runs of punctuation."""
    text = _PUNCTUATION_RUN.sub(r" \g<0> ", text.translate(_DASHES_AND_SIGNS))
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r"\s*\n\s*", " \n ", text)
    return re.sub(r"\S{100}", r"\g<0> ", text).strip()  # the time that spaCy takes grows with a word's length squared


def _chunks(texts: list[str], size: int = 4096) -> Iterator[list[str]]:
    """Slices of `texts` under a progress bar: the tokenizer's own records of a slice are large, 2 kB a text."""
    few = len(texts) <= size
    with tqdm(total=len(texts), desc="Tokenising", unit=" sentences", disable=few or None) as bar:
        for start in range(0, len(texts), size):
            yield texts[start : start + size]
            bar.update(size)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides how a text is tokenised. Special tokens are no part of it: texts never become them."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [state["normalizer"], state["pre_tokenizer"], state["model"]]
    parts += [token for token in state["added_tokens"] if not token["special"]]
    if tokenizer.init_kwargs.get("gpt_tokenization") == "spacy":
        import ftfy
        import spacy

        parts += ["spacy", spacy.__version__, ftfy.__version__]
    return json.dumps(parts)


def knows_dialog_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer belongs to a model that was made for dialogs."""
    return set(SPECIAL_TOKENS) <= tokenizer.get_added_vocab().keys()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of `SPECIAL_TOKENS`."""
    return tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)  # type: ignore[return-value]  # of a list it is a list

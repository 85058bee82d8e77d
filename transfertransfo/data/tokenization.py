"""Text -> token ids, many texts at once, and for GPT as in its own pre-training."""

import functools
import importlib.metadata
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from transfertransfo.errors import UserError

logger = logging.getLogger(__name__)

SPACING = 2  # to be raised by whoever changes what GPT's text becomes before its words are cut into pieces
WARNED_OF_UNKNOWN, MOST_UNKNOWN = 0.01, 0.5  # shares of the tokens of distinct texts
SPECIAL_TOKENS = ["<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>"]
ATTR_TO_SPECIAL_TOKEN: dict[str, Any] = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<speaker1>", "<speaker2>"],
}
_one_at_a_time = threading.Lock()  # a tokenizer is told what to do with special tokens by a setting of its own


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens: one written in the text, as `<eos>`, stays text."""
    with _one_at_a_time:
        if tokenizer.init_kwargs.get("gpt_tokenization") == "spacy":
            return _tokenize_with_spacy(tokenizer, texts)
        return _tokenize(tokenizer, texts)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # of texts, which a file may ask for, or the last call of transformers' own
    backend.no_padding()
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

    bpe = tokenizer.backend_tokenizer.model
    words_to_ids = Tokenizer(bpe)  # the BPE alone: words are split already
    knows_line_ends = bpe.token_to_id("\n</w>") is not None

    def words_of(text: str) -> list[str]:
        words = (word.text.lower() for word in _spacy_tokenizer()(_standardize(ftfy.fix_text(text))))
        # spaCy's word of a line end is "\n ", which GPT's pre-training took for "\n". A vocabulary that lacks it has
        # blanks alone between its words, and takes a line end for one
        return [word.rstrip(" ") for word in words if knows_line_ends or word != "\n "]

    return [
        encoding.ids
        for chunk in _chunks(texts)
        for encoding in words_to_ids.encode_batch_fast([words_of(text) for text in chunk], is_pretokenized=True)
    ]


@functools.cache
def _spacy_tokenizer() -> Callable[[str], Iterable]:
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
    # the time that spaCy takes grows with a word's length squared. No second blank where there is one: it were a word
    return re.sub(r"\S{100}(?=\S)", r"\g<0> ", text).strip()


def _chunks(texts: list[str], size: int = 4096) -> Iterator[list[str]]:
    """Slices of `texts` under a progress bar: the tokenizer's own records of a slice are large, 2 kB a text."""
    few = len(texts) <= size
    with tqdm(total=len(texts), desc="Tokenising", unit=" sentences", disable=few or None) as bar:
        for start in range(0, len(texts), size):
            yield texts[start : start + size]
            bar.update(size)


def count_unknown(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], tokens: Iterable[list[int]]) -> list[int]:
    """For each text, of which `tokenize` has made these tokens, how many of them stand for what cannot be written.

    Text of which nothing is left counts as one.
    """
    unknown = unknown_id(tokenizer)
    return [ids.count(unknown) if ids else int(bool(text.strip())) for text, ids in zip(texts, tokens, strict=True)]


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token for what cannot be written; -1 where there is none, as a tokenizer of bytes can write any text."""
    backend = tokenizer.backend_tokenizer
    name = getattr(backend.model, "unk_token", tokenizer.unk_token)  # a Unigram model does not say it
    found = backend.token_to_id(name) if name else None
    return -1 if found is None else found


def check_unknown(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: Sequence[list[int]], name: str
) -> None:
    """Say so where the tokenizer cannot write a part of these texts, of which `tokenize` has made these tokens.

    Raises:
        UserError: it is most of them.
    """
    counts = count_unknown(tokenizer, texts, tokens)
    share = sum(counts) / max(1, sum(len(ids) or 1 for ids in tokens))
    if share <= WARNED_OF_UNKNOWN:
        return
    example = texts[max(range(len(counts)), key=counts.__getitem__)]
    line = (
        f"{name}: {share:.1%} of its tokens are unknown to the model's tokenizer, most of them in {example[:40]!r};"
        " a model of byte-level tokens, as gpt2, writes any text"
    )
    if share > MOST_UNKNOWN:
        raise UserError(line)
    logger.warning("%s", line)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text as people write it, without spaces before punctuation and within contractions, and special tokens."""
    (text,) = tokenizer.batch_decode([ids], skip_special_tokens=True)
    return tokenizer.clean_up_tokenization(text)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides how a text is tokenised. Special tokens are no part of it: texts never become them."""
    backend = tokenizer.backend_tokenizer
    stages = (backend.normalizer, backend.pre_tokenizer, backend.model)
    parts = [stage.__getstate__().decode() if stage else "" for stage in stages]
    parts += [f"{i} {token!r}" for i, token in backend.get_added_tokens_decoder().items() if not token.special]
    if tokenizer.init_kwargs.get("gpt_tokenization") == "spacy":
        # asked of the packages' records: to import spaCy takes longer than to read a cached dataset
        parts += [f"{name} {importlib.metadata.version(name)}" for name in ("spacy", "ftfy")]
        parts.append(str(SPACING))
    return "\n".join(parts)


def knows_dialog_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer belongs to a model that was made for dialogs."""
    return set(SPECIAL_TOKENS) <= tokenizer.get_added_vocab().keys()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of `SPECIAL_TOKENS`."""
    return tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)  # type: ignore[return-value]  # of a list it is a list


# Names of the control tokens that begin and end a turn of a chat: ChatML, Llama 3, Gemma, Phi.
BEGIN_TURN = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>")
END_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def nearest_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """For the dialog tokens, but for `<pad>`, those of the tokenizer's own that do what they will do.

    To be asked before the dialog tokens are added, which take the names `bos_token` and `eos_token` over.
    """
    known = tokenizer.get_vocab()

    def first(*names: str | None) -> int | None:
        return next((known[name] for name in names if name in known), None)

    (line_end,) = tokenize(tokenizer, ["\n"])
    speaker = line_end[-1] if line_end else first(*BEGIN_TURN, tokenizer.eos_token)
    nearest = {
        "<bos>": first(tokenizer.bos_token, *BEGIN_TURN, tokenizer.eos_token),
        "<eos>": first(*END_TURN, tokenizer.eos_token),
        "<speaker1>": speaker,
        "<speaker2>": speaker,
    }
    return {token: source for token, source in nearest.items() if source is not None}


def make_chat_template(tokenizer: PreTrainedTokenizerBase, max_history: int) -> str:
    """The Jinja template by which transformers, vLLM and llama.cpp make what `build_input_from_segments` makes.

    The system message is the persona, a sentence a line; the last `2 * max_history + 1` turns before the reply count,
    of -1 all. Each sentence of the persona is tokenised by itself here, and all of them together there. What stands
    between them is what makes that the same, if anything does: a blank for words as GPT's, else nothing.
    """
    sentences = ["i like tea", "we have a dog"]  # letters meet: between a stop and a letter most tokenizers cut anyway
    apart = list(chain(*tokenize(tokenizer, sentences)))
    between = next((text for text in ("", " ") if tokenize(tokenizer, [text.join(sentences)]) == [apart]), "")
    window = 2 * max_history + 1
    kept = f"(turns[-{window}:] if add_generation_prompt else turns[-{window + 1}:])" if max_history >= 0 else "turns"
    return (
        "{{ '<bos>' }}"
        "{% for message in messages if message.role == 'system' %}"
        "{% set text = message.content if message.content is string"
        " else message.content | map(attribute='text') | join('\\n') %}"
        f"{{{{ text.split('\\n') | join('{between}') }}}}"
        "{% endfor %}"
        "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}"
        f"{{% for message in {kept} %}}"
        "{{ '<speaker2>' if message.role == 'user' else '<speaker1>' }}"
        "{{ message.content if message.content is string else message.content | map(attribute='text') | join('') }}"
        "{% endfor %}"
        "{{ '<speaker1>' if add_generation_prompt else '<eos>' }}"
    )

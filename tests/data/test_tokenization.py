"""Text -> token ids: against transformers, and GPT's own pre-processing step by step."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import OpenAIGPTTokenizer, PreTrainedTokenizerFast

from transfertransfo.data import tokenization
from transfertransfo.data.tokenization import SPECIAL_TOKENS, fingerprint, tokenize
from transfertransfo.model.sources import load_tokenizer

TEXTS = [
    "i'm fine , thanks .",
    "",
    "   ",
    "Can't we?!... “Yes” — she said;don't stop",
    "ï¬\x81ne",  # the ligature "fi", decoded wrongly
    "two\n\n lines\t here",
    "C++ (or C) costs $5.50/hour, e.g. at 9a.m.",
    "😀 Ünï İstanbul",
]
TYPED_TOKENS = "i said <eos> to <speaker1><pad> and <unk> and <|endoftext|>"


def test_spacy_tokenisation_by_its_steps(spacy_gpt):
    """ftfy, a standard spelling, spaCy's words, lower case, then the BPE of each word alone."""
    import ftfy
    import spacy

    words_of, bpe = spacy.blank("en"), spacy_gpt.backend_tokenizer.model
    for text, got in zip(TEXTS, tokenize(spacy_gpt, TEXTS), strict=True):
        words = [word.text.lower() for word in words_of(tokenization._standardize(ftfy.fix_text(text)))]
        words = [word for word in words if word != "\n "]  # this vocabulary has no line end
        assert got == [piece.id for word in words for piece in bpe.tokenize(word)]
    assert tokenize(spacy_gpt, [TEXTS[0]]) != tokenize_basic(spacy_gpt, [TEXTS[0]]), "else this test says little"


LOWER = {"type": "Lowercase"}
ADDED = {"content": "fine", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": False}  # fmt: skip


def added(**options) -> list[dict]:
    return [{"id": 400, **ADDED, **options}]


CHANGES = {  # of a serialised tokenizer: what is changed, each beside what the one before has
    "normalizer": {"normalizer": LOWER},
    "pre-tokenizer": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                                        "use_regex": True}},
    "added token": {"added_tokens": added()},
    "its text": {"added_tokens": added(content="thanks")},
    "its id": {"added_tokens": [*added(content="<new>"), *added(id=401)]},
    "its spaces before": {"added_tokens": added(lstrip=True)},
    "its spaces after": {"added_tokens": added(rstrip=True)},
    "its borders": {"added_tokens": added(content="in", single_word=True)},
    "no borders": {"added_tokens": added(content="in")},
    "not normalised": {"normalizer": LOWER, "added_tokens": added(content="Stop")},
    "normalised": {"normalizer": LOWER, "added_tokens": added(content="Stop", normalized=True)},
}  # fmt: skip


def test_all_that_decides_token_ids_is_in_the_fingerprint(gpt2, gpt, spacy_gpt):
    """Two tokenizers that give other ids have other fingerprints; each change here gives ids of its own."""
    texts = [*TEXTS, "it is fine , Stop going in"]
    states = {name: json.loads(gpt2.backend_tokenizer.to_str()) | change for name, change in CHANGES.items()}
    states["as it is"] = json.loads(gpt2.backend_tokenizer.to_str())
    model = states["as it is"]["model"]
    vocabulary = model["vocab"] | {"a": model["vocab"]["b"], "b": model["vocab"]["a"]}
    states["vocabulary"] = states["as it is"] | {"model": model | {"vocab": vocabulary}}
    states["merges"] = states["as it is"] | {"model": model | {"merges": model["merges"][1:]}}
    lossy = json.loads(gpt.backend_tokenizer.to_str())
    for unknown in ("<unk>", "a"):
        states[f"unknown: {unknown}"] = lossy | {"model": lossy["model"] | {"unk_token": unknown}}
    tokenizers = [PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
                  for state in states.values()]  # fmt: skip
    tokenizers.append(spacy_gpt)
    ids = {json.dumps(tokenize(tokenizer, texts)) for tokenizer in tokenizers}
    assert len(ids) == len(tokenizers) == len({fingerprint(tokenizer) for tokenizer in tokenizers})


def test_what_was_asked_of_transformers_before_changes_no_ids(checkpoints):
    """Its own calls leave their truncation and padding behind, by which a dataset's texts were cut, and cached so."""
    tokenizer = load_tokenizer(checkpoints["gpt2"])
    want, before = tokenize(tokenizer, TEXTS), fingerprint(tokenizer)
    tokenizer(TEXTS, truncation=True, max_length=3, padding="max_length")
    assert fingerprint(tokenizer) == before and tokenize(tokenizer, TEXTS) == want


PIECES = ["a</w>", ",</w>", ".</w>", "b</w>", "-</w>", "x", "x</w>", "\n</w>"]
LONG = [6] * 99 + [7]  # 100 letters, where long words are cut


def gpt_of(pieces):
    """A GPT tokenizer, as a new run uses it, that has these pieces alone, `<unk>` being 0 and they 1, 2, 3 ..."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", *pieces])}
    tokenizer = OpenAIGPTTokenizer(vocab=vocabulary, merges=[])
    tokenizer.init_kwargs["gpt_tokenization"] = "spacy"
    return tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a\nB", [1, 8, 4]),
        ("a .\n b", [1, 3, 8, 4]),
        (" a , \r\n\t\n\n  b\n", [1, 2, 8, 4]),
        ("- a\n- b\u2028a", [5, 1, 8, 5, 4, 8, 1]),
        ("\n", []),
        ("x" * 100 + " b", [*LONG, 4]),
        ("x" * 200 + "\n" + "x" * 100 + "b", [*LONG, *LONG, 8, *LONG, 4]),
    ],
)
def test_a_line_end_is_the_piece_that_it_is_in_gpt_s_pre_training(text, ids):
    """It was `<unk> <unk>`, and a blank after a word of 100 letters, where long words are cut, was `<unk>`.

    As transformers 4 and the code of 2018 have it: white space around line ends is folded, and what spaCy makes of
    them, a line end and a blank, is the piece `\\n</w>`. A vocabulary without that piece takes them for white space.
    """
    assert tokenize(gpt_of(PIECES), [text]) == [ids]
    assert tokenize(gpt_of(PIECES[:-1]), [text]) == [[i for i in ids if i != 8]]


def tokenize_basic(tokenizer, texts):
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def test_basic_tokenisation_is_that_of_transformers(gpt, gpt2):
    for tokenizer in (gpt, gpt2):
        assert tokenize(tokenizer, TEXTS) == tokenize_basic(tokenizer, TEXTS)


def test_many_texts_are_tokenised_as_each_alone(gpt, spacy_gpt, gpt2):
    texts = [f"{word} {number}" for number in range(1500) for word in ("hello", "we", "it's")]  # more than one slice
    for tokenizer in (gpt, spacy_gpt, gpt2):
        many = tokenize(tokenizer, texts)
        assert len(many) == len(texts)
        assert all(many[i] == tokenize(tokenizer, [texts[i]])[0] for i in range(0, len(texts), 499))


@pytest.mark.parametrize("mode", ["basic", "spacy", "gpt2"])
def test_special_tokens_written_in_a_text_stay_text(checkpoints, mode):
    """A partner who types <eos> must not end the reply, nor become a speaker."""
    tokenizer = load_tokenizer(checkpoints["gpt2" if mode == "gpt2" else "gpt"], None if mode == "gpt2" else mode)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    (ids,) = tokenize(tokenizer, [TYPED_TOKENS])
    if mode == "gpt2":
        assert tokenizer.decode(ids) == TYPED_TOKENS
        assert not special & set(ids)
    else:
        dialog_tokens = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
        assert not set(dialog_tokens) & set(ids)
    encoding = tokenizer.backend_tokenizer.encode("<eos>", add_special_tokens=False)
    assert encoding.ids == [tokenizer.eos_token_id], "elsewhere it is the token, as it was before"


@pytest.mark.parametrize(
    ("text", "standard"),
    [
        ("a—b–c―d", "a - b - c - d"),
        ("wait…", "wait..."),
        ("it´s", "it's"),
        ("what?!", "what ? !"),
        ("no!!! (yes)", "no !!! ( yes )"),
        ("a,b;c", "a , b ; c"),
        ('a|b_c[d]{e}~f/g\\h*i+j"k', 'a | b _ c [ d ] { e } ~ f / g \\ h * i + j " k'),
        ("3.5: it's fine.", "3.5: it's fine."),
        ("one \t two", "one two"),
        ("one\n\n\ntwo", "one \n two"),
        (" one  \n  two ", "one \n two"),
        ("", ""),
        (" \n\t ", ""),
        ("--- ~~", "--- ~~"),
    ],
)
def test_standard_spelling(text, standard):
    assert tokenization._standardize(text) == standard

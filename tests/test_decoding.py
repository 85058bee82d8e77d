"""Replies: cached as uncached, batched as one by one, beams as brute force, ranking as one sequence a reply."""

import itertools
import re
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from helpers import EVERY_FAMILY
from torch.testing import assert_close
from transformers import OpenAIGPTConfig

from transfertransfo.cli import ArgumentParser, add_decoding_flags
from transfertransfo.data.inputs import Example, build_input_from_segments, context_positions, tree_sizes
from transfertransfo.data.tokenization import SPECIAL_TOKENS
from transfertransfo.decoding import (
    Context,
    Decoding,
    agreement,
    beam_search,
    candidate_replies,
    decode,
    fit_context,
    generate,
    sample_sequence,
    top_filtering,
)
from transfertransfo.errors import SettingError, UserError, flags_named
from transfertransfo.evaluation.metrics import f1
from transfertransfo.model.cache import CachedRows, PrefixCache
from transfertransfo.model.double_heads import DoubleHeads
from transfertransfo.model.gpt import OpenAIGPTDoubleHeadsModel
from transfertransfo.ranking import score_candidates, weigh_candidates

of_every_family = pytest.mark.parametrize("family", EVERY_FAMILY)

# Ragged lengths; one without a persona.
CONTEXTS = [
    ([[10, 11, 12], [13, 14]], [[20, 21, 22]]),
    ([], [[30]]),
    ([[40, 41]] * 4, [[50, 51, 52], [53, 54, 55, 56], [57]]),
    ([[60]], [[61, 62], [63], [64, 65, 66], [67, 68], [69]]),
]
# Two turns of a dialog, one of another with the same persona, and one without any.
DIALOG = [*(([[60]], [[61, 62], [63], [64, 65]][:n]) for n in (1, 3)), ([[60]], [[61, 66]]), ([], [[30]])]


@pytest.fixture
def encoded(model, monkeypatch) -> list[torch.Tensor]:
    """The token ids of each forward of the test, (B, T)."""
    inputs, hidden_states = [], type(model).hidden_states

    def listening(self, ids, *rest):
        inputs.append(ids)
        return hidden_states(self, ids, *rest)

    monkeypatch.setattr(type(model), "hidden_states", listening)
    return inputs


def options(**changed) -> Decoding:
    return Decoding(**{"no_sample": True, "max_length": 8} | changed)


def next_logits(model, context, reply, tokenizer):
    """The next token's logits after `reply`, from the whole sequence, without a cache and without padding."""
    row = build_input_from_segments(*context[:2], reply, tokenizer, with_eos=False)
    ids, types = (torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids"))
    with torch.no_grad():
        return model.lm_logits(model.hidden_states(ids, types, torch.arange(ids.size(1))[None])[:, -1])[0]


def special_ids(tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)


def greedy_without_cache(model, context, tokenizer, args) -> list[int]:
    """The original's loop: everything computed again for each token."""
    reply = []
    for _ in range(args.max_length):
        logits = next_logits(model, context, reply, tokenizer)
        if len(reply) < args.min_length:
            logits[special_ids(tokenizer)] = -torch.inf
        if int(logits.argmax()) in special_ids(tokenizer):
            break
        reply.append(int(logits.argmax()))
    return reply


class LogitsModel(DoubleHeads):
    """A model whose next-token logits are the same everywhere."""

    def __init__(self, model: DoubleHeads, logits: dict[int, float]):
        super().__init__(model.pretrained)
        self.logits = logits

    def lm_logits(self, hidden):
        out = torch.full((*hidden.shape[:-1], self.pretrained.config.vocab_size), -100.0)
        for token, value in self.logits.items():
            out[..., token] = value
        return out


def test_filters():
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0], [0.0, 0.0, 9.0, 0.0]])
    assert top_filtering(logits.clone(), top_k=2, top_p=0.0).isfinite().tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]
    assert top_filtering(logits.clone(), top_p=0.7).isfinite().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]
    assert top_filtering(logits.clone(), top_p=0.0, threshold=2.5).isfinite().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]
    assert top_filtering(torch.zeros(3), top_k=9, top_p=0.0).tolist() == [0, 0, 0]
    assert top_filtering(logits[0].clone(), top_k=1, top_p=0.0, filter_value=-5.0).tolist() == [-5, 4, -5, -5]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_the_nucleus_is_that_of_the_whole_vocabulary_sorted(top_p, spread):
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(0)).double() * spread
    kept = top_filtering(logits.clone(), top_p=top_p).isfinite()
    for row, row_kept in zip(logits.softmax(-1), kept):
        likelier = (row > row[:, None]).double() @ row
        assert torch.equal(row_kept, likelier <= top_p)


@of_every_family
@pytest.mark.parametrize("contexts", [CONTEXTS[:1], CONTEXTS, DIALOG])
def test_cached_logits_equal_those_of_the_whole_sequence(model, tokenizer, contexts):
    sequences = [
        build_input_from_segments(*context, [], tokenizer, with_eos=False)
        | {"position_ids": context_positions(*context)}
        for context in contexts
    ]
    copies, tokens = 2, torch.randint(5, 200, (6, 2 * len(contexts)))
    with torch.inference_mode():
        rows = CachedRows(model, sequences, len(tokens))
        rows.repeat_(copies)
        order = torch.arange(copies * len(contexts)).flip(0)
        rows.select_(order)
        for step in range(len(tokens) + 1):
            for row, logits in zip(order.tolist(), rows.logits):
                reply = tokens[:step, order.tolist().index(row)].tolist()
                want = next_logits(model, contexts[row // copies], reply, tokenizer)
                assert_close(logits, want, atol=1e-5, rtol=1e-5)
            if step < len(tokens):
                rows.append_(tokens[step])


def test_contexts_that_begin_alike_are_encoded_together(model, tokenizer, monkeypatch, encoded):
    """Each token once: <bos> 60 <speaker2> 61 62 <speaker1>, then 63 <speaker2> 64 65 <speaker1>, or 66 <speaker1>."""
    replies = generate(model, DIALOG, tokenizer, options(max_length=2))
    trees = [(row != 0).sum().item() for row in encoded[0]]
    assert trees == [6 + 5 + 2, 4]
    assert replies == [generate(model, [context], tokenizer, options(max_length=2))[0] for context in DIALOG]
    monkeypatch.setattr("transfertransfo.model.cache.tree_sizes", partial(tree_sizes, longest=12))
    encoded.clear()
    assert generate(model, DIALOG, tokenizer, options(max_length=2)) == replies
    assert [(row != 0).sum().item() for row in encoded[0]] == [6 + 5, 6, 4]


@pytest.mark.parametrize("contexts", [CONTEXTS[:1], CONTEXTS])
def test_a_step_attends_to_its_own_row_and_no_padding(model, tokenizer, monkeypatch, contexts):
    sequences = [
        build_input_from_segments(*context, [], tokenizer, with_eos=False)
        | {"position_ids": context_positions(*context)}
        for context in contexts
    ]
    masks, hidden_states = [], model.hidden_states

    def listening(ids, types, positions, mask, cache):
        masks.append(mask)
        return hidden_states(ids, types, positions, mask, cache)

    monkeypatch.setattr(model, "hidden_states", listening)
    CachedRows(model, sequences, 1).append_(torch.full((len(contexts),), 7))
    first, second = masks
    if len(contexts) == 1:
        assert first is second is None
        return
    columns = max(len(sequence["input_ids"]) for sequence in sequences)
    for row, sequence in enumerate(sequences):
        padding = columns - len(sequence["input_ids"])
        assert second[row, 0, 0].nonzero().flatten().tolist() == [*range(padding, columns + 1)]


@of_every_family
@pytest.mark.parametrize("min_length", [0, 1, 5])
def test_greedy_replies_equal_those_without_a_cache(model, tokenizer, min_length):
    args = options(min_length=min_length, max_length=12)
    want = [greedy_without_cache(model, context, tokenizer, args) for context in CONTEXTS]
    assert [sample_sequence(*context, tokenizer, model, args) for context in CONTEXTS] == want
    assert generate(model, CONTEXTS, tokenizer, args) == want
    assert any(want)


def test_a_given_beginning_is_continued(model, tokenizer):
    args = options(max_length=6, min_length=6)
    whole = sample_sequence(*CONTEXTS[0], tokenizer, model, args)
    args = options(max_length=4, min_length=4)
    assert len(whole) == 6 and sample_sequence(*CONTEXTS[0], tokenizer, model, args, current_output=whole[:2]) == whole


def test_samples_follow_the_filtered_distribution(model, tokenizer):
    torch.manual_seed(0)
    args = options(no_sample=False, num_samples=4000, max_length=1, top_p=0.6, temperature=2.0)
    (replies,) = candidate_replies(model, CONTEXTS[:1], tokenizer, args)
    logits = next_logits(model, CONTEXTS[0], [], tokenizer) / 2.0
    want = top_filtering(logits, top_p=0.6).softmax(-1)
    want[special_ids(tokenizer)] = 0.0  # min_length is 1
    drawn = torch.bincount(torch.tensor(replies).flatten(), minlength=len(want)) / len(replies)
    assert len(replies) == 4000 and drawn[want == 0].sum() == 0
    assert_close(drawn, want / want.sum(), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    "changed", [{}, {"num_beams": 3}, {"no_sample": False}, {"no_sample": False, "num_samples": 3}]
)
def test_a_certain_special_token_ends_the_reply(model, tokenizer, changed):
    """The original drew again for ever, or warned "special token with probability 1", where min_length forbade it."""
    certain = LogitsModel(model, {special_ids(tokenizer)[1]: 200.0})
    replies = candidate_replies(certain, CONTEXTS, tokenizer, options(min_length=4, **changed))
    assert [found[0] for found in replies] == [[]] * len(CONTEXTS)


@pytest.mark.parametrize("token", range(len(SPECIAL_TOKENS)))
def test_every_special_token_ends_a_reply(model, tokenizer, token):
    logits = LogitsModel(model, {special_ids(tokenizer)[token]: 9.0, 7: 8.0})
    for changed in ({}, {"num_beams": 1}):
        assert generate(logits, CONTEXTS[:2], tokenizer, options(min_length=3, **changed)) == [[7, 7, 7]] * 2


@pytest.mark.parametrize("min_length", [0, 1, 6])
def test_one_beam_is_greedy(model, tokenizer, min_length):
    args = options(min_length=min_length, max_length=12)
    want = generate(model, CONTEXTS, tokenizer, args)
    assert generate(model, CONTEXTS, tokenizer, replace(args, num_beams=1, no_sample=False)) == want


def test_beams_of_a_batch_equal_those_of_one_context(model, tokenizer):
    args = options(num_beams=4)
    together = beam_search(model, CONTEXTS, tokenizer, args)
    assert together == [beam_search(model, [context], tokenizer, args)[0] for context in CONTEXTS]
    assert all(len(set(map(tuple, replies))) > 1 for replies in together)


class TinyVocabulary:
    """Stands for a tokenizer with the five special tokens and three words."""

    pad_token_id, eos_token_id = 4, 1

    def convert_tokens_to_ids(self, tokens):
        return [SPECIAL_TOKENS.index(token) for token in tokens]


@pytest.fixture(scope="module")
def tiny_model() -> DoubleHeads:
    torch.manual_seed(3)
    config = OpenAIGPTConfig(vocab_size=8, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = DoubleHeads(OpenAIGPTDoubleHeadsModel(config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def brute_force(model, context, tokenizer, args) -> list[tuple[float, list[int]]]:
    """Score and words of every reply that there can be, the best first."""
    found = []
    for length in range(args.max_length + 1):
        for words in itertools.product(range(5, 8), repeat=length):
            total = 0.0
            for place, word in enumerate(words):
                total += step_log_p(model, context, list(words[:place]), tokenizer, args)[word]
            if length == args.max_length:
                found.append((total / length**args.length_penalty, list(words)))
            else:
                ends = step_log_p(model, context, list(words), tokenizer, args)[:5]
                found += [((total + end) / (length + 1) ** args.length_penalty, list(words)) for end in ends]
    return sorted(found, reverse=True)


def step_log_p(model, context, reply, tokenizer, args) -> list[float]:
    log_p = next_logits(model, context, reply, tokenizer).log_softmax(-1)
    if len(reply) < args.min_length:
        log_p[:5] = -torch.inf
    return log_p.double().tolist()


@pytest.mark.parametrize("min_length", [0, 2])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_wide_beams_equal_brute_force(tiny_model, length_penalty, min_length):
    context, tokenizer = ([[5, 6]], [[7, 5]]), TinyVocabulary()
    args = options(max_length=3, min_length=min_length, length_penalty=length_penalty, num_beams=100, top_p=0.0)
    want = [words for score, words in brute_force(tiny_model, context, tokenizer, args) if score > -float("inf")]
    (found,) = beam_search(tiny_model, [context], tokenizer, args)
    assert found == want
    args = replace(args, num_beams=12)  # fewer than the 155 ends that there are, and more than the best needs
    assert beam_search(tiny_model, [context], tokenizer, args)[0][0] == want[0]


def test_longer_replies_win_with_a_length_penalty(tiny_model):
    lengths = []
    for length_penalty in (0.0, 1.0, 3.0):
        args = options(max_length=6, min_length=0, num_beams=20, length_penalty=length_penalty)
        lengths.append(len(generate(tiny_model, [([], [[5]])], TinyVocabulary(), args)[0]))
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_arguments_of_the_originals_time(model, tokenizer):
    """They lack the newer flags, and have others that are none of decoding's."""
    original = {"max_length": 8, "min_length": 3, "no_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9}
    args = Namespace(**original, dataset_path="", seed=0)
    assert Decoding.of(args) == Decoding(**original)
    want = generate(model, CONTEXTS, tokenizer, Decoding(**original))
    assert [sample_sequence(*context, tokenizer, model, args) for context in CONTEXTS] == want


def test_the_defaults_are_those_of_the_flags():
    parser = ArgumentParser("")
    add_decoding_flags(parser)
    assert list(asdict(Decoding()).items()) == list(vars(parser.parse_args([])).items())


@pytest.mark.parametrize("num_beams", [0, 3])
def test_no_ngram_comes_twice_in_a_reply(model, tokenizer, num_beams):
    logits = LogitsModel(model, {7: 3.0, 8: 2.0, 9: 1.0})
    args = options(max_length=9, top_p=0.0, num_beams=num_beams)
    assert 7 in generate(logits, CONTEXTS, tokenizer, args)[0][1:]
    args = replace(args, no_repeat_ngram_size=2)
    for reply in generate(logits, CONTEXTS, tokenizer, args):
        bigrams = list(itertools.pairwise(reply))
        assert len(bigrams) > 3 and len(set(bigrams)) == len(bigrams)


def test_repetition_penalty_counts_the_reply_alone(model, tokenizer):
    logits = LogitsModel(model, {7: 3.0, 8: 2.0})
    context = ([[7, 7]], [[7], [7, 7], [7]])
    args = options(max_length=4, repetition_penalty=2.0)
    assert generate(logits, [context], tokenizer, args) == [[7, 8, 7, 7]]  # 3 > 2; 1.5 < 2; 1.5 > 1; 1.5 > 1


@pytest.mark.parametrize("num_beams", [0, 2])
def test_ngrams_of_the_models_own_earlier_turns_are_blocked(model, tokenizer, num_beams):
    logits = LogitsModel(model, {7: 3.0, 8: 2.0, 9: 1.0})
    args = options(max_length=4, top_p=0.0, block_history_ngram=2, num_beams=num_beams)
    heard = ([], [[7, 7], [9], [7, 7]])  # 7 7 is the partner's
    said = ([], [[5], [7, 7], [5]])
    apart = ([], [[5], [7, 9, 7], [5], [7, 9, 7], [5]])  # 7 7 only across two turns
    long_ago = Context([], [[5]], earlier=[[8, 7, 7]])
    got = generate(logits, [heard, said, apart, long_ago], tokenizer, args)
    assert got[0] == got[2] == [7, 7, 7, 7]
    assert (7, 7) not in itertools.pairwise(got[1]) and got[1] == [7, 8, 7, 8]
    assert not {(7, 7), (8, 7)} & set(itertools.pairwise(got[3]))


def examples(replies: list[list[list[int]]]) -> list[Example]:
    """The first contexts with replies to each."""
    return [Example(*context, row) for context, row in zip(CONTEXTS, replies)]


@of_every_family
def test_ranking_equals_the_scores_of_one_sequence_a_reply(model, tokenizer):
    args = options(no_sample=False, num_samples=5, temperature=2.0)
    torch.manual_seed(1)
    drawn = candidate_replies(model, CONTEXTS, tokenizer, args)
    args = replace(args, rank=True)
    torch.manual_seed(1)
    ranked = candidate_replies(model, CONTEXTS, tokenizer, args)
    scores = score_candidates(model, tokenizer, examples(drawn))
    for context, replies, row, best_first in zip(CONTEXTS, drawn, scores, ranked):
        for reply, score in zip(replies, row):
            assert score == pytest.approx(one_sequence_score(model, context, reply, tokenizer), abs=1e-4)
        assert best_first == [reply for _, reply in sorted(zip(row, replies), key=lambda pair: -pair[0])]
    assert ranked != drawn


@of_every_family
def test_consensus_equals_the_f1_of_each_pair_of_replies(model, tokenizer):
    args = options(no_sample=False, num_samples=6, temperature=1.5)
    torch.manual_seed(1)
    drawn = candidate_replies(model, CONTEXTS, tokenizer, args)
    torch.manual_seed(1)
    chosen = candidate_replies(model, CONTEXTS, tokenizer, replace(args, consensus=True))
    for replies, row in zip(drawn, chosen):
        means = []
        for i, reply in enumerate(replies):
            others = [" ".join(map(str, other)) for j, other in enumerate(replies) if j != i]
            means.append(sum(f1(" ".join(map(str, reply)), [other]) for other in others) / len(others))
        assert agreement(replies) == pytest.approx(means)
        assert means[replies.index(row[0])] == pytest.approx(max(means))
    assert chosen != drawn


def test_agreement_counts_a_token_as_often_as_it_is_there():
    assert agreement([[7, 7], [7], [8]]) == pytest.approx([1 / 3, 1 / 3, 0])
    assert agreement([[], [], [7]]) == [0, 0, 0]


def one_sequence_score(model, context, reply, tokenizer) -> float:
    row = build_input_from_segments(*context, reply, tokenizer)
    ids, types = (torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids"))
    with torch.inference_mode():
        hidden = model.hidden_states(ids, types, torch.arange(ids.size(1))[None])
        return float(model.choice_scores(hidden[0, row["mc_token_ids"]]))


@of_every_family
def test_weighed_replies_equal_one_sequence_a_reply(model, tokenizer):
    replies = [[[7], [8, 9]], [[7, 8, 9]], [[]], [[9, 7], [9, 8], [9]]]
    for context, row, weighed in zip(CONTEXTS, replies, weigh_candidates(model, tokenizer, examples(replies))):
        for reply, (score, log_p) in zip(row, weighed, strict=True):
            assert score == pytest.approx(one_sequence_score(model, context, reply, tokenizer), abs=1e-4)
            sequence = build_input_from_segments(*context, reply, tokenizer, lm_labels=True)
            ids, types = (torch.tensor([sequence[name]]) for name in ("input_ids", "token_type_ids"))
            with torch.inference_mode():
                hidden = model.hidden_states(ids, types, torch.arange(ids.size(1))[None])
                losses = model.lm_logits(hidden[0, :-1]).float().log_softmax(-1)
            labels = torch.tensor(sequence["lm_labels"][1:])
            expected = losses[labels >= 0, labels[labels >= 0]].sum().item()
            assert log_p == pytest.approx(expected, abs=1e-3)


def test_scores_of_different_numbers_of_replies(model, tokenizer):
    replies = [[[7], [8, 9]], [[7]], [[]], [[9]]]
    assert [len(row) for row in score_candidates(model, tokenizer, examples(replies))] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_beams": 2, "num_samples": 2}, "num_beams and num_samples: beams are not sampled; give one of the two"),
        ({"num_samples": 2}, "num_samples 2: with no_sample they would all be the same"),
        ({"rank": True}, "rank: this takes several replies; give num_samples or num_beams of at least 2 too"),
        (
            {"rank": True, "num_beams": 1},
            "rank: this takes several replies; give num_samples or num_beams of at least 2 too",
        ),
        (
            {"consensus": True, "num_beams": 2},
            "consensus: this takes several replies; give num_samples or num_beams of at least 3 too",
        ),
        (
            {"consensus": True, "rank": True, "num_beams": 4},
            "rank and consensus: each says which reply comes first; give one of the two",
        ),
        ({"max_length": 126}, "max_length 126: more than the model's 128 positions hold"),
        ({"min_length": 9}, "min_length 9: more than max_length 8"),
    ],
)
def test_settings_that_cannot_be(model, tokenizer, changed, message):
    """The library names its own fields, a script their flags."""
    with pytest.raises(SettingError) as error:
        generate(model, CONTEXTS, tokenizer, options(**changed))
    assert str(error.value) == message
    with pytest.raises(UserError) as error, flags_named():
        generate(model, CONTEXTS, tokenizer, options(**changed))
    assert str(error.value) == re.sub(
        "rank|consensus|num_beams|num_samples|no_sample|m(ax|in)_length", r"--\g<0>", message
    )


def test_an_order_is_off_where_too_few_replies_are_left():
    ranked, agreed = Decoding(num_samples=4, rank=True), Decoding(num_beams=3, consensus=True)
    assert ranked.changed(num_samples=2) == Decoding(num_samples=2, rank=True)
    assert ranked.changed(num_samples=1, no_sample=True) == Decoding(no_sample=True)
    assert agreed.changed(num_beams=2) == Decoding(num_beams=2)
    assert agreed.changed(num_beams=0, num_samples=3) == Decoding(num_samples=3, consensus=True)
    with pytest.raises(SettingError, match=r"^rank: this takes several replies"):
        ranked.changed(num_samples=1, rank=True)


def test_contexts_longer_than_the_model(model, tokenizer):
    """The original's embedding lookup failed with an IndexError."""
    long = ([[7] * 30] * 3, [[8] * 200, [9] * 50, [10] * 300])
    args = options(max_length=20, min_length=20)
    cut = fit_context(model, Context(*long), args.max_length)
    assert [len(turn) for turn in cut.history] < [len(turn) for turn in long[1]]
    assert generate(model, [long, CONTEXTS[0]], tokenizer, args) == [
        generate(model, [context], tokenizer, args)[0] for context in (cut, CONTEXTS[0])
    ]


def test_rows_that_have_ended_say_so(model, tokenizer):
    args = options(max_length=12, min_length=0)
    want = generate(model, CONTEXTS, tokenizer, args)
    steps = list(decode(model, CONTEXTS, tokenizer, args))
    assert [list(itertools.chain(*gained)) for gained in zip(*steps)] == want
    assert len(steps) == max(map(len, want))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("changed", [{}, {"no_sample": False}, {"num_beams": 2}])
def test_scores_that_are_not_finite_are_said(model, tokenizer, monkeypatch, changed, bad):
    """They were a traceback: "probability tensor contains either `inf`, `nan` or element < 0"."""
    lm_logits, steps = type(model).lm_logits, []

    def spoiled(self, hidden):
        steps.append(None)
        return lm_logits(self, hidden).index_fill(-1, torch.tensor([7]), bad if len(steps) == 3 else 0.0)

    monkeypatch.setattr(type(model), "lm_logits", spoiled)
    with pytest.raises(UserError, match=r"^the model gives scores that are not finite"):
        generate(model, [CONTEXTS[0]], tokenizer, options(min_length=8, **changed))
    monkeypatch.setattr(type(model), "choice_scores", lambda self, hidden: hidden[..., 0] * bad)
    with pytest.raises(UserError, match=r"^the model gives scores that are not finite"):
        score_candidates(model, tokenizer, examples([[[7], [8]]]))


# A chat's turns, one after another


def chat_contexts(replies_of, max_history: int, turns: int = 4):
    """The contexts of a chat in which each reply joins the history."""
    persona, history = [[10, 11, 12], [13, 14]], []
    for turn in range(turns):
        history = [*history, [20 + turn, 21, 22]]
        context = (persona, history if max_history < 0 else history[-(2 * max_history + 1) :])
        yield context
        history = [*history, replies_of(context)]


@of_every_family
@pytest.mark.parametrize("changed", [
    {"num_beams": 3}, {"no_sample": False, "num_samples": 3, "rank": True},
    *(pytest.param(changed, marks=pytest.mark.slow) for changed in ({}, {"no_sample": False})),
])  # fmt: skip
@pytest.mark.parametrize("max_history", [1, -1])
def test_a_chat_with_a_memory_is_one_without(model, tokenizer, changed, max_history):
    memory, decoding = PrefixCache(), options(min_length=3, **changed)

    def replies_of(context) -> list[int]:
        found = []
        for given in (None, memory):
            torch.manual_seed(len(context[1]))
            found.append(candidate_replies(model, [context], tokenizer, decoding, memory=given)[0])
        assert found[0] == found[1] and found[0][0]
        return found[0][0]

    assert len(list(chat_contexts(replies_of, max_history))) == 4


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_turn_encodes_what_the_memory_does_not_serve(model, tokenizer, encoded):
    """With the whole history: the partner's words, two speakers, and the reply's last word if the cache lacks it."""
    memory = PrefixCache()

    def replies_of(context) -> list[int]:
        return candidate_replies(model, [context], tokenizer, options(min_length=8), memory=memory)[0][0]

    *_, (persona, history) = chat_contexts(replies_of, -1)
    first, *later = [ids.size(1) for ids in encoded if ids.size(1) > 1]
    assert first == 1 + 5 + 1 + 3 + 1 and later == [1 + 1 + 3 + 1] * 3
    encoded.clear()
    candidate_replies(model, [([[9], *persona[1:]], history)], tokenizer, options(), memory=memory)
    assert (
        encoded[0].size(1)
        == len(build_input_from_segments([[9], *persona[1:]], history, [], tokenizer, with_eos=False)["input_ids"]) - 1
    )


def test_logits_after_a_memory_are_those_of_the_whole_sequence(model, tokenizer):
    memory = PrefixCache()
    for persona, history in chat_contexts(
        lambda context: candidate_replies(model, [context], tokenizer, options(), memory=memory)[0][0], -1
    ):
        sequence = build_input_from_segments(persona, history, [], tokenizer, with_eos=False)
        sequence["position_ids"] = context_positions(persona, history)
        with torch.inference_mode():
            rows = memory.encode(model, [sequence], 8)
        assert_close(rows.logits[0], next_logits(model, (persona, history), [], tokenizer), atol=1e-5, rtol=1e-5)


def test_an_interrupted_reply_leaves_a_memory_that_serves(model, tokenizer, monkeypatch):
    """Ctrl-C may come between two layers of a forward."""
    memory, context = PrefixCache(), CONTEXTS[2]
    wanted = candidate_replies(model, [context], tokenizer, options(min_length=8))[0]
    lm_logits, calls = type(model).lm_logits, []

    def interrupted(self, hidden):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return lm_logits(self, hidden)

    monkeypatch.setattr(type(model), "lm_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        candidate_replies(model, [context], tokenizer, options(min_length=8), memory=memory)
    assert candidate_replies(model, [context], tokenizer, options(min_length=8), memory=memory)[0] == wanted


@of_every_family
def test_rows_leave_a_batch_of_greedy_replies_when_they_have_ended(model, tokenizer, monkeypatch, encoded):
    """The others go on as if they had been alone; n-grams of a context stay with it."""
    # each token once in a reply, so that there are many; then one of them ends replies
    contexts = [(persona, [[20 + i], *history]) for i in range(3) for persona, history in CONTEXTS]
    decoding = options(block_history_ngram=1, no_repeat_ngram_size=1, max_length=12, min_length=0)
    monkeypatch.setattr("transfertransfo.decoding.special_ids", lambda tokenizer: [tokenizer.eos_token_id])
    endless = [generate(model, [context], tokenizer, decoding)[0] for context in contexts]
    lengths = {end: [[*reply, end].index(end) for reply in endless] for end in set(itertools.chain(*endless))}
    end = max(lengths, key=lambda end: len(set(lengths[end])))
    assert len(set(lengths[end])) > 1
    monkeypatch.setattr("transfertransfo.decoding.special_ids", lambda tokenizer: [end, tokenizer.eos_token_id])
    encoded.clear()
    replies = generate(model, contexts, tokenizer, decoding)
    sizes = list(map(len, encoded))
    assert replies == [reply[:length] for reply, length in zip(endless, lengths[end])]
    assert sizes[0] == 12 and sizes == sorted(sizes, reverse=True)
    if sum(length < 8 for length in lengths[end]) > 3:
        assert sizes[-1] < 12


@pytest.mark.parametrize("seeds", [None, range(len(CONTEXTS))])
def test_samples_do_not_depend_on_which_rows_leave(model, tokenizer, monkeypatch, encoded, seeds):
    """Each row draws what it draws beside those that have ended."""
    decoding = options(no_sample=False, num_samples=3, block_history_ngram=1, min_length=0, max_length=12)
    ending = LogitsModel(model, {special_ids(tokenizer)[1]: -0.5, **dict.fromkeys(range(20, 40), -2.0)})
    found = []
    for leave in (0, 2, 100):  # none leaves, a half at a time, each at once
        torch.manual_seed(5)
        generators = seeds and [torch.Generator().manual_seed(seed) for seed in seeds]
        monkeypatch.setattr("transfertransfo.decoding.LEAVE", leave)
        steps = list(decode(ending, CONTEXTS, tokenizer, decoding, generators=generators))
        found.append([list(itertools.chain(*gained)) for gained in zip(*steps)])
        assert (min(map(len, encoded[1:])) < 12) == bool(leave)
        encoded.clear()
    assert found[0] == found[1] == found[2] and len(set(map(len, found[0]))) > 3


def test_samples_are_drawn_as_torch_draws_them(model, tokenizer):
    """So that a seed gives the replies that it gave the original."""
    decoding = options(no_sample=False, num_samples=3, max_length=1)
    torch.manual_seed(7)
    found = candidate_replies(model, CONTEXTS[:2], tokenizer, decoding)
    logits = torch.stack([next_logits(model, context, [], tokenizer) for context in CONTEXTS[:2]])
    probabilities = top_filtering(logits / decoding.temperature, top_p=decoding.top_p).softmax(-1)
    probabilities[:, special_ids(tokenizer)] = 0.0
    torch.manual_seed(7)
    assert torch.multinomial(probabilities.repeat_interleave(3, 0), 1).flatten().tolist() == [
        token for replies in found for (token,) in replies
    ]

"""A short form of `fuzz_dataset.py`, and datasets that hypothesis makes up. FUZZ=1000: so many of each kind."""

import json
import os
import resource
import time

import pytest
from fuzz_dataset import MAX_BYTES, MAX_SECONDS, check, main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MUTANTS, EXAMPLES = (int(os.environ.get("FUZZ", count)) for count in (25, 40))
STARTS = ["", '{"utterances": [{"reply": "a"}]}\n', "1 hello\thi\n", '{"messages": []}\n', "conv_id,history,reply,x\n"]
FIELDS = ["personality", "utterances", "candidates", "history", "reply", "train", "valid"]

texts = st.text(max_size=9) | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zs", "Zl"]), max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | texts, inner, max_size=3),
    max_leaves=8,
)
many_texts = st.lists(texts, max_size=4) | values
utterances = st.fixed_dictionaries(
    {}, optional={"history": many_texts, "candidates": many_texts, "reply": texts | values, "id": values}
)
dialogs = st.fixed_dictionaries(
    {}, optional={"personality": many_texts, "utterances": st.lists(utterances | values, max_size=3) | values}
)
ends = st.sampled_from(["\n", "\r\n", "\n\n", "\r", ""])
json_lines = st.lists(st.tuples((dialogs | values).map(json.dumps) | texts, ends), max_size=5)
parlai_lines = st.tuples(
    (st.integers(0, 4) | st.integers()).map(str) | texts,
    st.sampled_from([" ", "  ", "\t", "", " your persona: ", " your persona:", " partner's persona: "]),
    st.lists(texts | st.sampled_from(["a|b", "|", "a\\nb", "1.0"]), max_size=4).map("\t".join),
).map("".join)
parlai = st.lists(st.tuples(parlai_lines, ends), max_size=8)
roles = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", "A", "B"]) | values
parts = st.lists(st.fixed_dictionaries({"type": st.just("text") | values, "text": texts | values}) | values, max_size=2)
chat_turns = st.fixed_dictionaries(
    {}, optional={"role": roles, "from": roles, "content": texts | parts | values, "value": texts | values, "id": roles}
)
turn_lists = st.lists(chat_turns | texts | st.lists(chat_turns, max_size=2) | values, max_size=5)
records = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("messages", "conversations", "dialog"), turn_lists | values)
    | dict.fromkeys(("personas", "persona", "context", "system", "speaker", "conv_id", "labels", "label"), many_texts),
)
chats = st.lists(st.tuples(records.map(json.dumps) | texts, ends), max_size=5)
cells = texts | many_texts.map(json.dumps) | many_texts.map(repr) | turn_lists.map(json.dumps)
columns = ["history", "reply", "candidates", "label", "persona", "conv_id", "messages", "utterance", "speaker", "x"]
csv_lines = st.lists(st.tuples(st.lists(cells | st.sampled_from(columns), max_size=4).map(",".join), ends), max_size=5)


def test_mutated_datasets_end_well(capsys):
    assert main(["--mutants", str(MUTANTS)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", [json_lines, parlai, chats, csv_lines], ids=["json lines", "parlai", "chat records", "csv"]
)
def test_made_up_datasets_end_well(tmp_path, kind):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=EXAMPLES,
        deadline=None,  # of the wall's clock; here the processor's counts
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(STARTS), kind)
    def end_well(start, lines):
        path = tmp_path / "made_up.txt"
        path.write_bytes((start + "".join(map("".join, lines))).encode(errors="surrogatepass"))
        begun = time.process_time()
        check(path)
        assert time.process_time() - begun < MAX_SECONDS

    end_well()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) * 1024 < MAX_BYTES

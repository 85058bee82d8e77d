"""A short form of `fuzz_dataset.py`, and datasets that hypothesis makes up. FUZZ=1000: so many of each kind."""

import json
import os
import resource

import pytest
from fuzz_dataset import MAX_BYTES, MAX_SECONDS, check, main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ", 100))
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


def test_mutated_datasets_end_well(capsys):
    assert main(["--mutants", str(EXAMPLES)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("start", ["", '{"utterances": [{"reply": "a"}]}\n', "1 hello\thi\n"])
@pytest.mark.parametrize("kind", [json_lines, parlai], ids=["json lines", "parlai"])
def test_made_up_datasets_end_well(tmp_path, kind, start):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=EXAMPLES,
        deadline=1000 * MAX_SECONDS,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(kind)
    def end_well(lines):
        path = tmp_path / "made_up.txt"
        path.write_bytes((start + "".join(map("".join, lines))).encode(errors="surrogatepass"))
        check(path)

    end_well()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) * 1024 < MAX_BYTES

"""The benchmark of the generative ideas: its rows are what they say, at a small size."""

import math
from dataclasses import replace

import pytest

from coloss.data import load_characters
from coloss.lab.benchmarks import generative
from coloss.lab.benchmarks.generative import attention_rows, position_rows, search_rows, subword_rows


@pytest.fixture
def short(monkeypatch):
    """A little of the text in the place of all of it."""
    text = load_characters()
    text = replace(text, train=text.train[:8_000], test=text.test[:2_000])
    monkeypatch.setattr(generative, "load_characters", lambda: text)
    return text


def test_both_searches_try_as_many_settings():
    ours, random = search_rows(seeds=1, evaluations=12)
    assert ours.case == "best of 12 settings, cross-entropy method" and ours.ratio is not None
    assert 0 < ours.value < math.log(10) and 0 < random.value < math.log(10)


def test_all_blocks_are_plain_attention(short):
    rows = {row.case: row.value for row in attention_rows(1, 2)}
    assert rows["evaluated with share 1"] == pytest.approx(0, abs=1e-5)
    assert rows["evaluated with share 0.3"] != 0


def test_every_way_of_subwords_beats_characters_and_is_beside_bpe(short):
    characters = len(set(short.train.tolist()))
    rows = {row.case: row for row in subword_rows((characters, 100))}
    alone = {rows[f"{characters:,} pieces, {name}"].value for name in ("likelihood", "BPE", "WordPiece")}
    assert len(alone) == 1  # no room for a merge: the same characters
    assert rows["100 pieces, BPE"].ratio is None and rows["100 pieces, likelihood"].ratio is not None
    assert max(rows[f"100 pieces, {name}"].value for name in ("likelihood", "BPE")) < min(alone)


def test_positions_are_judged_near_and_far(short):
    rows = {row.case: row for row in position_rows(1, 2)}
    assert list(rows) == [
        f"{kind}, tokens {span}"
        for kind in ("rotary", "rotary-harmonic", "rotary-harmonic-log")
        for span in ("64 to 128", "384 to 512")
    ]
    assert len({row.value for row in rows.values()}) == 6
    assert rows["rotary, tokens 384 to 512"].ratio is None
    far, other = rows["rotary-harmonic, tokens 384 to 512"], rows["rotary, tokens 384 to 512"]
    assert far.ratio == pytest.approx(far.value / other.value)

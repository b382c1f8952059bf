"""Packing against a brute-force concatenation; identities of windows."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curriq.data.stream import Packer, window_id, windows_from_state, windows_to_state

EOS = 0
documents = st.lists(
    st.tuples(
        st.lists(st.integers(1, 50_000), max_size=40),
        st.one_of(st.just(math.nan), st.floats(-5, 5)),
    ),
    max_size=25,
)


def brute_force(texts, length):
    """Every token with its label in one list, an EOS behind each non-empty document, cut by hand."""
    stream = []
    for tokens, label in texts:
        if tokens:
            stream += [(token, label) for token in [*tokens, EOS]]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


@settings(deadline=None)
@given(documents, st.integers(2, 17))
def test_packing_is_concatenation_with_eos_cut_every_t_tokens(texts, length):
    packer = Packer("web", length, EOS)
    windows = [window for tokens, label in texts for window in packer.add(tokens, label)]
    expected = brute_force(texts, length)
    assert [w.tokens.tolist() for w in windows] == [[token for token, _ in e] for e in expected]
    for window, pairs in zip(windows, expected, strict=True):
        labels = [label for _, label in pairs if not math.isnan(label)]
        mean = math.fsum(labels) / len(labels) if labels else math.nan
        assert window.difficulty == pytest.approx(mean, nan_ok=True, abs=1e-12)


@settings(deadline=None)
@given(documents, st.integers(2, 17), st.data())
def test_a_packer_resumes_anywhere(texts, length, data):
    cut = data.draw(st.integers(0, len(texts)))
    whole, first, second = (Packer("web", length, EOS) for _ in range(3))
    uninterrupted = [w for tokens, label in texts for w in whole.add(tokens, label)]
    before = [w for tokens, label in texts[:cut] for w in first.add(tokens, label)]
    second.load_state_dict(first.state_dict())
    after = [w for tokens, label in texts[cut:] for w in second.add(tokens, label)]
    assert [w.window_id for w in before + after] == [w.window_id for w in uninterrupted]
    np.testing.assert_array_equal(
        [w.difficulty for w in before + after], [w.difficulty for w in uninterrupted]
    )


def test_window_id_is_the_documented_hash():
    tokens = np.array([1, 258, 3], np.int32)
    content = b"web\0" + bytes([1, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0])
    expected = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
    assert window_id("web", tokens) == expected
    assert window_id("web", tokens.astype(np.int64)) == expected
    assert window_id("code", tokens) != expected
    assert 0 <= expected < 2**63


def test_ids_of_many_windows_are_distinct_and_fit_int64():
    ids = [window_id("web", np.array([i, i + 1])) for i in range(5000)]
    assert len(set(ids)) == 5000
    assert torch.tensor(ids).min() >= 0


def test_windows_survive_a_checkpoint(tmp_path):
    packer = Packer("web", 4, EOS)
    windows = packer.add(range(1, 20), 2.5) + packer.add(range(1, 20))
    torch.save(windows_to_state(windows, 4), tmp_path / "state.pt")
    restored = windows_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for old, new in zip(windows, restored, strict=True):
        np.testing.assert_array_equal(old.tokens, new.tokens)
        assert new.window_id == old.window_id
        np.testing.assert_equal(new.difficulty, old.difficulty)


def test_no_windows_survive_a_checkpoint():
    assert windows_from_state(windows_to_state([], 4)) == []

"""Comparisons of observations, worked by hand."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from recipes.cap.certify.differences import compare, greedy_agreement, same_experts
from recipes.cap.certify.llama_cpp_consumer import read_log_probs
from recipes.cap.certify.observation import Observation, SequenceObservation, log_softmax


def _observation(
    rows: list[list[float]], tokens: list[int], first: int = 0, experts: list[list[int]] | None = None
) -> Observation:
    ids = {} if experts is None else {3: np.array(experts)}
    found = SequenceObservation(first, np.log(np.array(rows, np.float32)), None, ids)
    return Observation("x", [tokens], [found])


def test_figures_of_two_positions() -> None:
    mine = _observation([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]], [0, 1, 0])
    theirs = _observation([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]], [0, 1, 0])
    found = compare(mine, theirs)
    # The text's next tokens are 1 and 0; nothing follows the last position.
    assert found.tokens == 2
    assert found.max_logprob_diff == pytest.approx(math.log(0.75 / 0.5))
    assert found.mean_logprob_diff == pytest.approx(math.log(1.5) / 2)
    first_kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert (found.max_kl, found.mean_kl) == pytest.approx((first_kl, first_kl / 2))
    assert found.perplexity == pytest.approx(1 / math.sqrt(0.75 * 0.25))
    assert found.reference_perplexity == pytest.approx(1 / math.sqrt(0.5 * 0.25))
    assert found.same_top == 0.5


def test_rows_that_begin_later_are_compared_with_the_same_positions() -> None:
    mine = _observation([[0.9, 0.1], [0.25, 0.75], [0.5, 0.5]], [0, 1, 1])
    later = _observation([[0.25, 0.75]], [0, 1, 1], first=1)
    found = compare(mine, later)
    assert (found.tokens, found.mean_kl) == (1, 0.0)
    assert found.perplexity == pytest.approx(1 / 0.75)


def test_tokens_below_the_floor_count_as_one() -> None:
    # It tells 0.8 of the first token, and of the others no more than that they have 0.05 at most each.
    mine = _observation([[0.8, 0.15, 0.05], [0.8, 0.15, 0.05]], [0, 0])
    rows = np.log(np.array([[0.7, 0.05, 0.05]] * 2, np.float32))
    floor = np.log(np.array([0.05] * 2, np.float32))
    theirs = Observation("x", [[0, 0]], [SequenceObservation(0, rows, floor)])
    found = compare(mine, theirs)
    assert found.mean_kl == pytest.approx(0.8 * math.log(0.8 / 0.7) + 0.2 * math.log(0.2 / 0.3), rel=1e-5)


def test_a_set_of_experts_has_no_order() -> None:
    rows, tokens = [[0.5, 0.5]] * 4, [0, 1, 0, 1]
    mine = _observation(rows, tokens, experts=[[0, 1], [1, 2], [2, 3], [0, 3]])
    theirs = _observation(rows, tokens, experts=[[1, 0], [2, 1], [2, 0], [0, 3]])
    assert same_experts(mine, theirs) == {3: 0.75}
    assert same_experts(mine, _observation(rows, tokens)) == {}


def test_generation_agrees_up_to_the_first_other_token() -> None:
    sequences = [[0, 1]] * 2
    mine = Observation("x", sequences, [], [[5, 6, 7], [1, 2, 3]])
    theirs = Observation("y", sequences, [], [[5, 9, 7], [1, 2, 3]])
    assert greedy_agreement(mine, theirs) == (4, 6)
    assert greedy_agreement(mine, Observation("y", sequences, [])) is None


def test_log_softmax_is_that_of_the_definition() -> None:
    logits = np.array([[1.0, 2.0, 4.0], [1000.0, 0.0, -1000.0]], np.float32)
    total = math.log(math.exp(1) + math.exp(2) + math.exp(4))
    np.testing.assert_allclose(log_softmax(logits)[0], [1 - total, 2 - total, 4 - total], rtol=1e-6)
    assert log_softmax(logits)[1, 0] == 0.0


def test_the_log_probabilities_of_llama_cpp(tmp_path: Path) -> None:
    # Two sequences of 6 tokens, rows for positions 3 and 4, a vocabulary of 3: a step and the least value,
    # then steps above it, and padding to an even number.
    steps = np.array([[0, 10, 20], [5, 0, 1], [2, 2, 2], [0, 0, 9]], np.uint16)
    rows = b"".join(
        struct.pack("<ff", 0.5, -8.0) + row.tobytes() + struct.pack("<H", 0xFFFF) for row in steps
    )
    tokens = np.arange(12, dtype=np.int32)
    path = tmp_path / "saved"
    path.write_bytes(b"_logits_" + struct.pack("<Iii", 6, 3, 2) + tokens.tobytes() + rows)
    found = read_log_probs(path, "llama.cpp")
    assert [list(x) for x in found.sequences] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert [each.first for each in found.found] == [3, 3]
    np.testing.assert_array_equal(found.found[0].log_probs_SV, [[-8, -3, 2], [-5.5, -8, -7.5]])
    np.testing.assert_array_equal(found.found[1].log_probs_SV, [[-7, -7, -7], [-8, -8, -3.5]])
    np.testing.assert_array_equal(found.found[1].floor_S, [-8, -8])

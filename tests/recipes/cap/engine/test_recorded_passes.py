"""Recorded passes, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe.accounting.utilisation import Machine
from moe.errors import ModelError
from recipes.cap.engine import recorded_passes
from recipes.cap.engine.graft_vllm_experts import _described, _Pass
from recipes.cap.engine.recorded_passes import begin_record, end_record, timed
from recipes.cap.loading import known_from_config
from recipes.cap.served import _recorded
from recipes.cap.server import Server, ServerError

SERVER = Server("http://x", "m", records=True)
CONFIG = {
    "model_type": "mixtral",
    "dtype": "float32",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
KNOWN, _ = known_from_config(CONFIG, None)
# Two prompts of six tokens together, two tokens of each, and a third prompt after a pause.
PASSES: list[dict[str, Any]] = [
    {"start": 10.0, "requests": [["a", 0, 6], ["b", 0, 6]], "experts": ["3f", "1f"]},
    {"start": 11.0, "requests": [["a", 6, 1], ["b", 6, 1]], "experts": ["7", "3"]},
    {"start": 11.5, "requests": [["a", 7, 1], ["b", 7, 1]], "experts": ["f", "30"]},
    {"start": 11.75, "requests": [["b", 8, 1]], "experts": ["3", "3"]},
    {"start": 40.0, "requests": [["c", 0, 6]], "experts": ["3", "3"]},
]


def answers(monkeypatch: pytest.MonkeyPatch, reply: Any) -> None:
    """Has the server answer so."""
    monkeypatch.setattr(recorded_passes, "call", lambda server, path, body: {"results": [reply]})


def test_passes_have_the_seconds_to_the_next_of_their_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"passes": PASSES})
    found = timed(end_record(SERVER))
    assert [one.seconds for one in found] == [1.0, 0.5, 0.25]
    assert [one.recorded.decodes for one in found] == [False, True, True]
    assert found[2].recorded.experts_L == ({0, 1, 2, 3}, {4, 5})
    assert found[1].recorded.batch.lengths == (7, 7) and found[0].recorded.batch.new == (6, 6)
    point = _recorded(KNOWN, found, Machine(bytes_per_s=1e9, flops=1e12), 2, "apart")
    decode, read = point["decode"], point["prefill"]
    assert (decode["passes"], decode["seconds"], read["passes"], read["seconds"]) == (2, 0.75, 1, 1.0)
    # 3 and 2 experts, 4 and 2: of 12 that two passes of two layers could touch at batch 1 a mean of 11 / 4.
    assert decode["distinct"]["source"] == "traced" and decode["distinct"]["mean"] == 11 / 4
    assert decode["s_mbu"] == pytest.approx(decode["bytes"]["complete"] / 0.75 / 1e9)
    assert read["distinct"]["per_layer"] == [6, 5] and read["tokens_per_s"] == 12


def test_bytes_of_an_expert_more(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    for mask in ("3", "13"):
        answers(monkeypatch, {"passes": [PASSES[0], PASSES[1] | {"experts": [mask, "3"]}, PASSES[2]]})
        point = _recorded(KNOWN, timed(end_record(SERVER)), Machine(bytes_per_s=1e9, flops=None), 2, "apart")
        counted.append(point["decode"]["bytes"]["complete"])
    # Three matrices of 32 by 48 in fp32.
    assert counted[1] - counted[0] == 3 * 32 * 48 * 4


def test_no_pass_of_the_whole_batch_has_no_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"passes": PASSES})
    point = _recorded(KNOWN, timed(end_record(SERVER)), Machine(bytes_per_s=1e9, flops=None), 3, "2 at once")
    assert point["decode"]["s_mbu"] is None and point["decode"]["utilisation_reason"] == "2 at once"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"error": "no MoE layer"}, "no MoE layer"),
        ({"passes": [PASSES[0] | {"experts": None}]}, "--enforce-eager"),
        ({"passed": []}, "not as the extension does"),
        (None, "not as the extension does"),
    ],
)
def test_a_server_that_does_not_record(monkeypatch: pytest.MonkeyPatch, reply: Any, words: str) -> None:
    answers(monkeypatch, reply)
    with pytest.raises(ModelError, match=f"--server-experts='http://x'.*{words}"):
        end_record(SERVER)


def test_a_server_without_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise ServerError("HTTP 404: Not Found")

    monkeypatch.setattr(recorded_passes, "call", refuse)
    with pytest.raises(ModelError, match=r"does not record its passes: HTTP 404.*leave the flag out"):
        begin_record(SERVER, KNOWN.shape)


def test_layers_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"experts": [6, 6]})
    begin_record(SERVER, KNOWN.shape)
    answers(monkeypatch, {"experts": [6, 8]})
    with pytest.raises(ModelError, match=r"it has MoE layers of \[6, 8\] experts.*describes \[6, 6\]"):
        begin_record(SERVER, KNOWN.shape)


def test_padding_is_no_token_and_an_unseen_layer_is_told() -> None:
    one = _Pass([["a", 4, 2], ["b", 9, 1]], 2, 6, "cpu")
    one.mark(0, torch.tensor([[0, 1], [1, 2], [5, 0], [3, 4]]))  # the last row is padding
    assert _described(one)["experts"] is None  # the second layer was not seen
    one.mark(1, torch.tensor([[0, 1]]))
    one.mark(1, torch.tensor([[4, 1], [1, 0], [5, 5]]))
    # 0, 1, 2 and 5; 0, 1 and 4
    assert _described(one)["experts"] == ["27", "13"]
    assert _described(one)["requests"] == [["a", 4, 2], ["b", 9, 1]]

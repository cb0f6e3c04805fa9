"""A certificate holds for a program that computes the same, and says where another differs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from recipes.cap.certify.base import Consumer, ConsumerError, Places
from recipes.cap.certify.certificate import Certificate, ConsumerResult, certify
from recipes.cap.certify.certify_export import with_others
from recipes.cap.certify.observation import Observation, Request
from recipes.cap.certify.observed_module import observe_module

_TOKENS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0)).tolist()
_REQUEST = Request(_TOKENS, prompt_length=12, new_tokens=4)


def _mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(config).eval()


@dataclass(frozen=True)
class _Other(Consumer):
    """A program that computes something else, in a way that each test chooses."""

    change: Callable[[Any], None]
    name = "other"

    def observe(self, folder: Path, request: Request, scratch: Path) -> Observation:
        model = _mixtral()
        self.change(model)
        return observe_module(model, request, "other 1.0")


def _certified(change: Callable[[Any], None]) -> ConsumerResult:
    reference = partial(observe_module, _mixtral(), version="trainer")
    (result,) = certify(
        Path(), reference, [_Other(Places(), lambda line: None, change)], _REQUEST, lambda line: None
    )
    return result


def _router_without_renormalisation(model: Any) -> None:
    def halve(module: Any, args: Any, out: Any) -> Any:
        logits, weights, ids = out
        return logits, weights * 0.5, ids

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(halve)


def _another_choice(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.mul_(-1)


def _another_expert(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2].mul_(1.5)


def test_the_same_is_certified() -> None:
    result = _certified(lambda model: None)
    assert result.certified and result.reason == ""
    assert result.free is not None and result.free.mean_kl == 0.0 and result.free.same_top == 1.0
    assert result.same_experts == {0: 1.0, 1: 1.0} and result.greedy == (8, 8)
    assert result.lines()[0].startswith("other 1.0: certified: KL 0.0e+00")


def test_other_weights_of_a_router_are_told_from_another_choice() -> None:
    weighs = _certified(_router_without_renormalisation)
    assert not weighs.certified and weighs.reason.startswith("its router chooses or weighs otherwise")
    assert weighs.pinned is not None and weighs.pinned.mean_kl < 1e-9
    chooses = _certified(_another_choice)
    assert not chooses.certified and chooses.reason.startswith("its router chooses or weighs otherwise")
    assert chooses.same_experts is not None and chooses.same_experts[0] == 1.0
    assert chooses.same_experts[1] < 0.5


def test_another_expert_is_not_laid_to_the_router() -> None:
    result = _certified(_another_expert)
    assert not result.certified and "not (only) the router" in result.reason
    assert result.same_experts is not None and result.same_experts[0] == 1.0


def test_nan_is_no_figure() -> None:
    def spoil(model: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight.fill_(math.nan)

    result = _certified(spoil)
    assert result.lines() == ["other: not certified: its log-probabilities are not finite"]


def test_a_program_that_fails_is_named_with_its_words() -> None:
    def fail(model: Any) -> None:
        raise ConsumerError("other failed: no such head size")

    result = _certified(fail)
    assert result.lines() == ["other: not certified: other failed: no such head size"]
    assert result.free is None


@pytest.mark.parametrize("program", ["vllm", "llama.cpp"])
def test_a_program_whose_place_is_not_named_is_asked_for(program: str, capsys: Any) -> None:
    from tools.certify import main

    with pytest.raises(Exception, match=f"--in='{program}'.*Name its"):
        main([".", "--in", program])


def test_a_later_certificate_keeps_what_was_found_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    kept = Certificate("hf", "graft, step 4", "t.txt", 64, (ConsumerResult("vllm", certified=True),))
    path.write_text(json.dumps(with_others(kept, path)))
    later = Certificate("hf", "graft, step 4", "t.txt", 64, (ConsumerResult("transformers"),))
    assert [found["name"] for found in with_others(later, path)["results"]] == ["vllm", "transformers"]
    again = replace(later, results=(ConsumerResult("vllm"),))
    assert [found["certified"] for found in with_others(again, path)["results"]] == [False]
    other_text = replace(later, text="u.txt")
    assert [found["name"] for found in with_others(other_text, path)["results"]] == ["transformers"]
    path.write_text("[1]")
    assert len(with_others(later, path)["results"]) == 1

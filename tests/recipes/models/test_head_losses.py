"""Losses by rows against transformers' own logits and a plain cross-entropy, family by family."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.models.hf import head_losses
from recipes.models.hf.head_losses import computes_losses

VOCABULARY, SAMPLES, LENGTH, ROWS = 97, 2, 11, 5
_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 32}
# Heads that cap, scale, have biases, are tied or sit elsewhere in the module.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gptj": _GPT2 | {"rotary_dim": 4},
    "gpt2": _GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "phi": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


class _Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, out.numel() if isinstance(out, Tensor) else 0)
        return out


def _model(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], **_SMALL | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    return model


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:], torch.rand(SAMPLES, LENGTH, generator=generator)


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _plain(model: Any, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
    logits = model(input_ids=inputs_BS, use_cache=False).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten(), reduction="none")
    return losses.view(targets_BS.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_whole_logits(family: str) -> None:
    model, (inputs_BS, targets_BS, weights_BS) = _model(family), _batch()
    plain_BS = _plain(model, inputs_BS, targets_BS)
    wanted = _gradients(model, (plain_BS * weights_BS).sum())
    with patch.object(head_losses, "rows_at_once", lambda *_: ROWS), _Largest() as largest:
        with computes_losses(model, targets_BS):
            losses = model(input_ids=inputs_BS, use_cache=False)
        assert not losses._is_view(), "FSDP2 loses its hooks on views"
        losses_BS = losses.view_as(targets_BS)
        found = _gradients(model, (losses_BS * weights_BS).sum())
    torch.testing.assert_close(losses_BS, plain_BS, rtol=1e-6, atol=1e-6)
    assert list(found) == list(wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    # The embedding has more elements than the logits of five tokens; nothing has those of all.
    assert largest.elements < SAMPLES * LENGTH * VOCABULARY
    assert type(model(input_ids=inputs_BS).logits) is Tensor, "logits again, once it is closed"


def test_evaluation_and_autocast_go_by_rows_too() -> None:
    model, (inputs_BS, targets_BS, _) = _model("gemma2"), _batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain_BS = _plain(model, inputs_BS, targets_BS)
        with (
            patch.object(head_losses, "rows_at_once", lambda *_: ROWS),
            computes_losses(model, targets_BS),
        ):
            losses_BS = model(input_ids=inputs_BS, use_cache=False).view_as(targets_BS)
    assert losses_BS.dtype == torch.float32
    torch.testing.assert_close(losses_BS, plain_BS, rtol=1e-6, atol=1e-6)


def test_few_logits_are_computed_in_one_piece() -> None:
    model, (inputs_BS, targets_BS, _) = _model("llama"), _batch()
    with computes_losses(model, targets_BS):
        losses_BS = model(input_ids=inputs_BS, use_cache=False).view_as(targets_BS)
    assert torch.equal(losses_BS, _plain(model, inputs_BS, targets_BS))


def test_a_model_that_does_not_name_its_blocks_computes_in_one_piece() -> None:
    model, (inputs_BS, targets_BS, _) = _model("llama"), _batch()
    plain_BS = _plain(model, inputs_BS, targets_BS)
    model.base_model_prefix = ""
    with patch.object(head_losses, "rows_at_once", lambda *_: ROWS), computes_losses(model, targets_BS):
        losses_BS = model(input_ids=inputs_BS, use_cache=False).view_as(targets_BS)
    assert torch.equal(losses_BS, plain_BS)

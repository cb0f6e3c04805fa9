"""Documents of a sample are nothing to one another, in every family and implementation of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.data.config import DataConfig
from recipes.models.hf import packed_attention
from recipes.models.hf.document_inputs import document_inputs
from recipes.models.hf.packed_attention import check_documents, keeps_apart
from tests.conftest import MakeCheckpoint, random_model
from tests.grid import each
from tests.recipes.models.test_find_ffns import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

# Row 0 holds documents of 3 and 5 tokens, row 1 of 5 and 3.
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]])
DOCUMENTS = [(0, slice(0, 3)), (0, slice(3, 8)), (1, slice(0, 5)), (1, slice(5, 8))]
BY_MASK = ("opt", "xglm", "biogpt")
ROUNDING = 2e-6


def tokens() -> Tensor:
    return torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(1))


def model_of(family: str, attention: str = "sdpa") -> Any:
    """One block: attention of further ones gets the same mask."""
    model = random_model(family, num_hidden_layers=1, **({"alibi": False} if family == "falcon" else {}))
    if attention in ("eager", model.config._attn_implementation) or model._supports_sdpa:
        model.set_attn_implementation(attention)
    return model


def packed(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, **document_inputs(model, POSITIONS)).logits
    return logits


@each("attention", ["sdpa", "eager"])
@each("family", [*FAMILIES, *BY_MASK])
def test_a_document_is_computed_as_when_it_is_alone(family: str, attention: str) -> None:
    model, ids = model_of(family, attention), tokens()
    embedded: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: embedded.append(out.detach().requires_grad_()) or embedded[-1]
    )
    logits = packed(model, ids)
    with torch.no_grad():
        # Another first document in both rows: not a bit of the second changes.
        others = torch.cat([ids[:, :3] + 7, ids[:, 3:]], 1) % 300
        assert torch.equal(packed(model, others)[0, 3:], logits[0, 3:])
    for number, (row, place) in enumerate(DOCUMENTS):
        (grad,) = torch.autograd.grad(logits[row, place].sum(), embedded[0], retain_graph=True)
        own = torch.zeros(ids.shape, dtype=torch.bool)
        own[row, place] = True
        assert bool((grad[~own] == 0.0).all()), number
        assert bool((grad[own] != 0.0).any()), number
        with torch.no_grad():
            alone = model(input_ids=ids[row, place][None], use_cache=False).logits[0]
            torch.testing.assert_close(
                logits[row, place], alone, rtol=0, atol=ROUNDING * float(alone.abs().max())
            )


def test_the_probe_sees_what_leaks_and_what_does_not() -> None:
    assert keeps_apart(model_of("llama"))
    assert keeps_apart(model_of("falcon"))
    for leaky in (model_of("bloom"), random_model("falcon", alibi=True)):
        assert not keeps_apart(leaky)
    model = model_of("falcon")
    with patch.object(packed_attention, "document_inputs", lambda model, at: {"position_ids": at}):
        assert not keeps_apart(model), "falcon builds its mask without positions"
    with patch.object(packed_attention, "document_inputs", lambda model, at: {}):
        assert not keeps_apart(model_of("llama"))


def test_without_a_boundary_nothing_is_passed() -> None:
    model = model_of("llama")
    assert document_inputs(model, torch.arange(8).repeat(2, 1)) == {}
    assert document_inputs(model, None) == {}
    assert set(document_inputs(model, POSITIONS)) == {"position_ids"}


def test_a_mask_is_of_the_models_dtype_and_hides_in_bf16_too() -> None:
    model = model_of("opt").bfloat16()
    mask = document_inputs(model, POSITIONS)["attention_mask"]
    assert (mask.dtype, mask.shape) == (torch.bfloat16, (2, 1, 8, 8))
    assert bool(mask.isfinite().all())
    assert torch.equal(mask[0, 0, 3:, :3] < -1e38, torch.ones(5, 3, dtype=torch.bool))
    assert keeps_apart(model)


def test_a_model_that_cannot_is_refused_by_name(make_checkpoint: MakeCheckpoint) -> None:
    folder = Path(make_checkpoint("falcon", alibi=True))
    [mistake] = check_documents(DataConfig(), folder)
    rule = "with sdpa attention a token of falcon sees the other documents of its sample"
    assert (mistake.path, mistake.value, mistake.rule) == ("data.document_mask", True, rule)
    assert "data.document_mask=false" in mistake.remedy
    assert check_documents(DataConfig(document_mask=False), folder) == []


def test_flash_attention_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    model = model_of("llama")
    model.config._attn_implementation = "flash_attention_2"
    with patch.object(packed_attention, "_few_blocks", lambda *_: model):
        [mistake] = check_documents(DataConfig(), Path())
    assert "knows documents in batches of one sample only" in mistake.rule


@each("family", ["llama", "gemma3_text", "gpt2", "phi", "falcon"])
def test_the_preflight_runs_all_kinds_of_blocks(family: str, make_checkpoint: MakeCheckpoint) -> None:
    more = {"alibi": False} if family == "falcon" else {}
    if family == "gemma3_text":
        more = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    folder = Path(make_checkpoint(family, **more))
    blocks = packed_attention._few_blocks(folder, False).config.num_hidden_layers
    assert blocks == (3 if family == "gemma3_text" else 1)
    assert check_documents(DataConfig(), folder) == []


def test_losses_of_packed_text_are_those_of_documents() -> None:
    """The first token of a document is still a target, of the last one of the document before."""
    model, ids = model_of("qwen3"), tokens()
    with torch.no_grad():
        found = F.cross_entropy(packed(model, ids)[0, :-1], ids[0, 1:], reduction="none")
        alone = [model(input_ids=ids[:1, place]).logits[0] for _, place in DOCUMENTS[:2]]
        wanted = F.cross_entropy(torch.cat(alone)[:-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(found, wanted)

"""Factors of a host: drawn alike wherever they are, and merged into what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe.errors import ConfigError
from moe.experts.lora import DRAWN, FACTOR_NAMES, FACTORS, drawn_factor
from moe.experts.lora_config import LoraConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.configs.copies_config import CopyConfig
from recipes.models.export import choose_exporter
from recipes.models.export.graft_format import load_graft
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import export
from recipes.models.hf.hf_model import HFModel
from recipes.models.lora_model import add_low_rank, require_rank
from recipes.upcycling.convert.moe_plan import MoERequest, plan_moe
from recipes.upcycling.sharded.sharded_models import moe_model
from tests.conftest import MakeCheckpoint
from tests.recipes.models.test_exporters import assert_same_logits, names_in, reload, trained_model, write

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = LoraConfig(rank=4, alpha=6.0)


def _with_factors(folder: Path) -> HFModel:
    """Factors as training makes them."""
    model = trained_model(folder)
    add_low_rank(model, LORA, seed=3)
    for index, layer in model.moe_layers():
        generator = torch.Generator().manual_seed(index)
        for name in sorted(FACTOR_NAMES - DRAWN):
            factor = getattr(layer.experts, name)
            factor.data.copy_(0.3 * torch.randn(factor.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_exported_model_is_the_trained_one(
    family: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = _with_factors(make_checkpoint(family))
    exporter, _ = choose_exporter(describe_model(model))
    assert exporter.is_native == (family == "llama")
    folder = write(model, tmp_path / "hf")
    assert not [name for name in names_in(folder) if "lora" in name]
    module: Any = reload(folder) if family == "llama" else load_graft(folder).module
    assert_same_logits(module, model)
    plain = trained_model(make_checkpoint(family))
    with pytest.raises(AssertionError):
        assert_same_logits(module, plain)


def test_the_weights_in_the_files_are_the_sum(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = _with_factors(make_checkpoint("qwen3"))
    exporter, _ = choose_exporter(describe_model(model))
    tensors = list(model.module.state_dict().items())
    before = {name: tensor.clone() for name, tensor in tensors}
    export(model, exporter, tensors, tmp_path / "hf", torch.float32, writes=True, layout="fused")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for index, layer in model.moe_layers():
        for weight, fused in (("w_up_EUD", "gate_up_proj"), ("w_down_EDF", "down_proj")):
            (name,) = [n for n in found if f"layers.{index}." in n and n.endswith(fused)]
            a, b = (getattr(layer.experts, part).double() for part in FACTORS[weight])
            exact = getattr(layer.experts, weight).double() + LORA.scale * b @ a
            # fp32 rounds the sum of r + 1 terms.
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-6)


def test_a_host_without_memory_draws_the_same_factors(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    request = MoERequest(folder, CopyConfig(num_experts=4), TopKConfig(), 3)
    deferred = moe_model(plan_moe(request))
    add_low_rank(deferred, LORA, seed=3)
    factors = [p for name, p in deferred.module.named_parameters() if "lora" in name]
    assert len(factors) == 4 * len(deferred.moe_layers()) and all(factor.is_meta for factor in factors)
    assert deferred.weights is not None
    deferred.weights.give(deferred.module, torch.device("cpu"))
    whole = trained_model(folder)
    add_low_rank(whole, LORA, seed=3)
    for (index, ours), (_, theirs) in zip(deferred.moe_layers(), whole.moe_layers(), strict=True):
        for name in FACTOR_NAMES:
            factor: Tensor = getattr(ours.experts, name)
            assert factor.requires_grad and torch.equal(factor, getattr(theirs.experts, name))
            drawn = drawn_factor(3, index, name, 2, (factor.shape[1], factor.shape[2]))
            assert torch.equal(factor[2], drawn) if name in DRAWN else not factor.any()
        assert not ours.experts.w_up_EUD.requires_grad and not ours.experts.w_up_EUD.is_meta


def test_a_rank_above_the_experts_width_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    spec = describe_model(trained_model(make_checkpoint("llama")))
    width = min(spec.moe_blocks[0].expert.width, spec.moe_blocks[0].expert.model_width)
    require_rank(spec, LoraConfig(rank=width))
    with pytest.raises(ConfigError, match=rf"experts.lora.rank={width + 1}: .*Set {width} or less"):
        require_rank(spec, LoraConfig(rank=width + 1))

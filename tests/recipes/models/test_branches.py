"""Several dense models become one mixture: experts of each, the mean of the rest, and what must agree.

Letters: D model width, F width.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.dispatch.local import LocalDispatcher
from moe.errors import ConfigError
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.topk import TopKRouter
from moe.upcycle.branch_train_mix import BranchTrainMix
from moe.upcycle.configs.branch_train_mix_config import BranchTrainMixConfig
from recipes.models.hf.branches import check_sources
from recipes.models.hf.ffn_blocks import find_ffns
from recipes.models.hf.hf_model import HFModel
from tests.conftest import VOCABULARY, MakeCheckpoint, random_model
from tests.recipes.models.whole_surgery import Surgery, swap, upcycle

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(seed: int, **config: Any) -> HFModel:
    """A model whose weights differ from seed to seed."""
    model = random_model("llama", **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05 * seed)
    return HFModel(module=model, folder=Path("nowhere"), source_dtype=torch.float32)


def surgery_of(**config: Any) -> Surgery:
    """Top-2 under copies of several models."""
    router = TopKConfig()
    return Surgery(
        method=BranchTrainMix(BranchTrainMixConfig(**config)),
        make_router=lambda width, experts: TopKRouter(router, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=0,
    )


@pytest.mark.parametrize(("keep_seed", "owners"), [(True, [0, 0, 1, 1, 2, 2]), (False, [1, 1, 1, 2, 2, 2])])
@pytest.mark.parametrize("tied", [True, False])
def test_experts_are_the_branches_and_the_rest_their_mean(
    keep_seed: bool, owners: list[int], tied: bool
) -> None:
    models = [model_of(seed, tie_word_embeddings=tied) for seed in range(3)]
    before = [{k: v.clone() for k, v in model.module.state_dict().items()} for model in models]
    networks = [find_ffns(model.module, model.config)[1].weights.down_DF.clone() for model in models]
    surgery = surgery_of(num_experts=6, sources=["a", "b"], keep_seed=keep_seed, layers=[1])
    swap(models[0], surgery, models[1:])
    ((_, layer),) = models[0].moe_layers()
    for expert, owner in enumerate(owners):
        assert torch.equal(layer.experts.w_down_EDF[expert], networks[owner]), expert
    members = before if keep_seed else before[1:]
    for name, value in models[0].module.state_dict().items():
        if ".layers.1.mlp." in name:
            continue
        # Dense layers that stay are of the mean as well.
        mean = torch.stack([state[name] for state in members]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-7, msg=name)
    assert (models[0].module.lm_head.weight is models[0].module.model.embed_tokens.weight) == tied
    for model, state in zip(models[1:], before[1:], strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())


def test_the_mixture_of_branches_claims_nothing_and_drifts() -> None:
    models = [model_of(0), model_of(1)]
    tokens = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    report = upcycle(models[0], surgery_of(num_experts=4, sources=["a"]), tokens, models[1:])
    assert not report.claimed_exact and report.logits.relative > 1e-3


def test_models_that_do_not_fit_the_experts_are_refused_by_the_surgery() -> None:
    models = [model_of(0), model_of(1)]
    with pytest.raises(ConfigError, match="upcycle.num_experts=5: it does not divide over 2 dense models"):
        swap(models[0], surgery_of(num_experts=5, sources=["a"]), models[1:])


def test_folders_are_checked_before_weights_are_read(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    seed = make_checkpoint("llama")
    branch = Path(shutil.copytree(seed, tmp_path / "branch"))
    assert check_sources([str(branch)], str(seed), trust_remote_code=False) == []
    assert check_sources([str(branch)], None, trust_remote_code=False) == []

    config = json.loads((branch / "config.json").read_text())
    (branch / "config.json").write_text(json.dumps(config | {"hidden_size": 64, "dtype": "bfloat16"}))
    tokenizer = json.loads((branch / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 300
    (branch / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = [str(branch), str(tmp_path / "nothing")]
    found = check_sources(given, str(seed), trust_remote_code=False)
    assert [(mistake.path, mistake.rule) for mistake in found] == [
        ("upcycle.sources.0", "its hidden_size is 64, the dense model's is 32"),
        ("upcycle.sources.0", "its tokenizer has another vocabulary than the dense model's"),
        ("upcycle.sources.1", "the folder does not exist"),
    ]

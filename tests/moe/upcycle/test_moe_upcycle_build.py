"""Plans are carried out block by block: the height of the blocks changes nothing that is not drawn.

Letters: D model width, E experts, F width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle import expert_rows as build_module
from moe.upcycle.build_experts import ffn_shape
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.configs.branch_train_mix_config import BranchTrainMixConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.configs.drop_config import DropConfig
from moe.upcycle.configs.partition_config import PartitionConfig
from moe.upcycle.configs.shared_dense_config import SharedDenseConfig
from moe.upcycle.configs.shared_routed_config import SharedRoutedConfig
from moe.upcycle.configs.shuffle_slice_config import ShuffleSliceConfig
from moe.upcycle.configs.virtual_group_config import VirtualGroupConfig
from moe.upcycle.dense_shape import Matrix
from moe.upcycle.expert_rows import DenseMatrix, expert_blocks, expert_shape
from moe.upcycle.layer_plan import Draws
from tests.moe.routers.routing_cases import build, label, make_ffn, make_method

pytestmark = pytest.mark.usefixtures("one_thread")

UNDRAWN: list[UpcycleConfig] = [
    CopyConfig(permute=True),
    BranchTrainMixConfig(num_experts=4, sources=["branch"]),
    PartitionConfig(),
    SharedDenseConfig(expert_width=5),
    SharedRoutedConfig(),
    ShuffleSliceConfig(ratio=0.0),
    VirtualGroupConfig(),
    VirtualGroupConfig(scale="cube_root"),
]


@pytest.mark.parametrize("config", UNDRAWN, ids=label)
def test_blocks_of_any_height_make_the_same(config: UpcycleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = make_ffn(biased=True, F=16)
    whole = build(config, ffn)
    # Rows are 6 or 16 wide: blocks of three rows, and of one.
    monkeypatch.setattr(build_module, "_BLOCK_ELEMENTS", 18)
    small = build(config, ffn)
    for ours, theirs in ((whole.bank, small.bank), (whole.shared, small.shared)):
        if ours is None:
            continue
        for name, value in vars(ours).items():
            if isinstance(value, Tensor):
                assert torch.equal(value, getattr(theirs, name)), name


def test_moments_of_any_height_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    expected = (float(weight.mean()), float(weight.std()))
    assert DenseMatrix(weight).moments == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(build_module, "_BLOCK_ELEMENTS", 50)
    assert DenseMatrix(weight).moments == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("config", [*UNDRAWN[:1], *UNDRAWN[2:], DropConfig(num_experts=2)], ids=label)
def test_streamed_blocks_are_the_experts_in_memory(config: UpcycleConfig) -> None:
    # What a converter does that holds one matrix at a time: also of what is drawn, at the same height.
    ffn = make_ffn(F=16)
    draws, method = Draws(1, 0), make_method(config, TopKConfig())
    bank = build(config, ffn, TopKConfig()).bank
    assert ffn.gate_FD is not None
    dense: dict[Matrix, DenseMatrix] = {
        "gate": DenseMatrix(ffn.gate_FD),
        "up": DenseMatrix(ffn.up_FD),
        "down": DenseMatrix(ffn.down_DF),
    }
    for e, plan in enumerate(method.plan(ffn_shape(ffn), draws, {}).experts):
        F = plan.width
        in_memory = {
            "gate": bank.w_up_EUD[e, :F],
            "up": bank.w_up_EUD[e, F:],
            "down": bank.w_down_EDF[e],
        }
        for matrix, source in dense.items():
            streamed = torch.cat(list(expert_blocks(plan, matrix, source, draws.of_matrix(e, matrix))))
            assert streamed.shape == expert_shape(plan, matrix, 6)
            assert torch.equal(streamed, in_memory[matrix]), (e, matrix)

"""N ranks do what one rank does: clipping, AdamW, Muon, saved state; uneven shards included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.muon import StackedMuon, adjusted_lr
from recipes.engines.optim.optimizer import build_optimizer, clip_grad_norm
from tests.distributed_helper import run_ranks
from tests.recipes.engines.optim.test_optim import TinyMoE, tiny

WORLD = 4
LR = 0.05
# 4 ranks: 7 rows are cut 2, 2, 2, 1; 2 experts leave two ranks without one.
CASES = [
    ((7, 5), (Shard(0),), 1),
    ((1, 5), (Shard(0),), 1),
    ((6, 8), (Shard(1),), 1),
    ((6, 4, 5), (Shard(0),), 2),
    ((2, 5, 4), (Shard(0),), 1),
    ((3, 6, 4), (Shard(1),), 2),
    ((3, 6, 4), (Replicate(),), 1),
]


def check_all(rank: int, world_size: int) -> None:
    flat = init_device_mesh("cpu", (world_size,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    for shape, placements, blocks in CASES:
        check_muon(shape, flat, placements, blocks)
    check_muon_under_expert_parallelism(square)
    check_clipping(flat, square)
    for name in ("adamw", "muon"):
        check_training(name, flat)


def pair(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def alone(weight: Tensor, grad: Tensor, blocks: int) -> Tensor:
    param = nn.Parameter(weight.clone())
    param.grad = grad.clone()
    StackedMuon([param], lr=LR, blocks=blocks).step()
    return param.detach()


def tolerance(shape: tuple[int, ...], blocks: int) -> float:
    # Batches of another size may round a bf16 product apart (2^-8) in an update of size at most about one.
    return 2 * 2.0**-8 * adjusted_lr(LR, shape[-2] // blocks, shape[-1], "match_rms_adamw")


def check_muon(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Any, ...], blocks: int) -> None:
    weight, grad = pair(shape, 0)
    param = nn.Parameter(distribute_tensor(weight.clone(), mesh, placements))
    param.grad = distribute_tensor(grad, mesh, placements)
    StackedMuon([param], lr=LR, blocks=blocks).step()
    torch.testing.assert_close(
        param.full_tensor().detach(), alone(weight, grad, blocks), rtol=0, atol=tolerance(shape, blocks)
    )


def check_muon_under_expert_parallelism(mesh: DeviceMesh) -> None:
    """Experts cut over the expert axis, then by FSDP over the data axis: a strided shard of one axis."""
    weight, grad = pair((6, 4, 5), 1)
    holder = nn.Module()
    holder.stack = nn.Parameter(distribute_tensor(weight, mesh["expert"], [Shard(0)]))
    fully_shard(holder, mesh=mesh["data"])
    param = holder.stack
    whole = DTensor.from_local(grad, mesh, [Replicate(), Replicate()])
    param.grad = whole.redistribute(placements=param.placements)
    StackedMuon([param], lr=LR).step()
    torch.testing.assert_close(
        param.full_tensor().detach(), alone(weight, grad, 1), rtol=0, atol=tolerance(weight.shape, 1)
    )


def check_clipping(flat: DeviceMesh, square: DeviceMesh) -> None:
    grads = [pair(shape, seed)[1] for seed, shape in enumerate([(7, 5), (2,), (4, 6), (4, 4), (3,)])]
    places: list[tuple[DeviceMesh, list[Any]] | None] = [
        (flat, [Shard(0)]),
        (flat, [Shard(0)]),
        (square, [Shard(0), Shard(1)]),
        (square, [Replicate(), Shard(0)]),
        None,
    ]
    params, plain = [], []
    for grad, place in zip(grads, places, strict=True):
        value = grad.clone() if place is None else distribute_tensor(grad.clone(), *place)
        params.append(nn.Parameter(torch.zeros_like(value)))
        params[-1].grad = value
        plain.append(nn.Parameter(torch.zeros_like(grad)))
        plain[-1].grad = grad.clone()
    norm = clip_grad_norm(params, 0.5)
    expected = nn.utils.clip_grad_norm_(plain, 0.5)
    assert type(norm) is Tensor and norm.ndim == 0
    torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(params, plain, strict=True):
        grad = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
        torch.testing.assert_close(grad, theirs.grad)


def sharded(mesh: DeviceMesh, seed: int = 0) -> TinyMoE:
    model = tiny(seed)
    fully_shard(model, mesh=mesh, ignored_params={model.norm.weight, model.norm.bias})
    return model


def set_grads(model: nn.Module, step: int) -> None:
    for index, param in enumerate(model.parameters()):
        grad = pair(tuple(param.shape), 100 * step + index)[1]
        cut = isinstance(param, DTensor)
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if cut else grad


def check_training(name: str, mesh: DeviceMesh) -> None:
    """Three steps on four ranks, stopped and resumed after two, against three steps on one."""
    config = OptimConfig(name=name, lr=LR)
    one, many, resumed = tiny(), sharded(mesh), sharded(mesh, seed=5)
    reference, optimizer = build_optimizer(one, config), build_optimizer(many, config)
    for step in range(2):
        for model, its in ((one, reference), (many, optimizer)):
            set_grads(model, step)
            clip_grad_norm(model.parameters(), config.clip_norm)
            its.step()
    later = build_optimizer(resumed, config)
    with torch.no_grad():
        for target, source in zip(resumed.parameters(), many.parameters(), strict=True):
            target.copy_(source)
        saved = optimizer.state_tensors(many.named_parameters())
        live = later.state_tensors(resumed.named_parameters())
        assert list(live) == list(saved)
        for key, value in live.items():
            assert isinstance(value, DTensor) == isinstance(saved[key], DTensor), key
            value.copy_(saved[key])
    for model, its in ((one, reference), (many, optimizer), (resumed, later)):
        set_grads(model, 2)
        clip_grad_norm(model.parameters(), config.clip_norm)
        its.step()
    for (key, a), b, c in zip(one.named_parameters(), many.parameters(), resumed.parameters(), strict=True):
        whole = b.full_tensor() if isinstance(b, DTensor) else b
        again = c.full_tensor() if isinstance(c, DTensor) else c
        assert torch.equal(whole, again), key
        # AdamW: fp32, another summation order in the norm. Muon: three bf16 updates, as in check_muon.
        loose = name == "muon" and a.ndim > 1
        torch.testing.assert_close(whole, a, rtol=1e-5, atol=3 * tolerance((8, 8), 1) if loose else 1e-6)


@pytest.mark.distributed
def test_four_ranks_equal_one() -> None:
    run_ranks(check_all, WORLD)

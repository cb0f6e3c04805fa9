"""Checkpoints of several ranks: FSDP2, HSDP and mixed shardings, failures on one rank only."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from moe.errors import CheckpointError, DiskError
from recipes.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from recipes.runtime import safetensors_codec
from tests.distributed_helper import run_ranks

pytestmark = pytest.mark.distributed


def _model(seed: int) -> nn.Module:
    """Odd sizes: on two ranks the shards are uneven, and those of one-element tensors empty on rank 1."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1))
    model.register_buffer("expert_bias", torch.randn(3))
    return model


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """One AdamW step, then everything that a checkpoint holds, by global name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.linspace(-1, 1, 20).reshape(4, 5)).square().sum().backward()
    optimizer.step()
    tensors: dict[str, Tensor] = {**model.state_dict()}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"optim.{name}.{key}": value for key, value in state.items()}
    return tensors


def _sharded(seed: int, world_size: int) -> dict[str, Tensor]:
    model = _model(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    return _trained(model)


def _full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in tensors.items()
    }


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def _save_and_load(rank: int, world_size: int, ours: str, theirs: str) -> tuple[Any, Any, Any, Any]:
    tensors = _sharded(0, world_size)
    path = save_checkpoint(ours, 5, tensors, {"step": 5}, {"rng": torch.full((2,), rank)}, keep_last=1)
    saved = _full(tensors)

    again = _sharded(1, world_size)
    loaded = load_checkpoint(find_checkpoint(ours).path or "", again, checksums=False)
    _assert_equal(_full(again), saved)

    plain = load_checkpoint(theirs, again)
    local = {name: value.to_local() for name, value in tensors.items() if isinstance(value, DTensor)}
    empty = [name for name, value in local.items() if not value.numel()]
    return path, (loaded.step, loaded.state, loaded.rank_tensors), (saved, _full(again), plain), empty


def test_fsdp_on_two_ranks_and_one_process_read_each_other(tmp_path: Path) -> None:
    alone = _trained(_model(2))
    theirs = save_checkpoint(tmp_path / "one", 7, alone, {}, {"rng": torch.zeros(1)})
    results = run_ranks(_save_and_load, 2, str(tmp_path / "two"), str(theirs))
    for rank, (_, loaded, (_, from_one, plain), _) in enumerate(results):
        assert loaded[:2] == (5, {"step": 5})
        _assert_equal(loaded[2], {"rng": torch.full((2,), rank)})
        _assert_equal(from_one, _full(alone))
        assert (plain.step, plain.world_size, plain.rank_tensors) == (7, 1, None)
    assert "3.bias" in results[1][3]  # one element: nothing of it is on rank 1

    path, _, (saved, _, _), _ = results[0]
    blank = {name: torch.full_like(value, 9) for name, value in saved.items()}
    assert load_checkpoint(path, blank).rank_tensors is None
    _assert_equal(blank, saved)
    # Written once: both files together hold the tensors, 2 rank tensors of 16 bytes, and the headers.
    payload = sum(value.numel() * value.element_size() for value in saved.values()) + 2 * 16
    headers = size = 0
    for file in path.glob("rank-*.safetensors"):
        data = file.read_bytes()
        headers += 8 + int.from_bytes(data[:8], "little")
        size += len(data)
    assert size == payload + headers


_SHARDINGS: dict[str, tuple[Any, Any]] = {
    "hsdp": (Replicate(), Shard(0)),
    "replicated": (Replicate(), Replicate()),
    "grid": (Shard(0), Shard(1)),
    "same axis": (Shard(1), Shard(1)),
    "fsdp after ep": (_StridedShard(0, split_factor=2), Shard(0)),
    "fsdp after tp": (_StridedShard(1, split_factor=2), Shard(1)),
    "torn": (_StridedShard(0, split_factor=4), Shard(1)),
}


def _reshard(rank: int, world_size: int, root: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    whole = torch.arange(11 * 6 * 2).reshape(11, 6, 2)

    def spread(value: Tensor) -> dict[str, Tensor]:
        tensors = {
            name: distribute_tensor(value, mesh, placements, src_data_rank=None)
            for name, placements in _SHARDINGS.items()
        }
        # On a mesh of its own in each pair of ranks: the two pairs hold the same.
        tensors["submesh"] = distribute_tensor(value, mesh["inner"], [Shard(0)], src_data_rank=None)
        return tensors

    ours = spread(whole)
    stage = {f"stage{rank}": torch.full((2,), rank)}  # as in pipeline parallelism
    path = save_checkpoint(root, 1, {**ours, **stage}, {})
    theirs = spread(torch.zeros_like(whole))
    names = list(theirs)
    rotated = dict(zip(names, [theirs[name] for name in names[3:] + names[:3]], strict=True))
    load_checkpoint(path, {**rotated, **{name: torch.zeros_like(value) for name, value in stage.items()}})
    for name, value in theirs.items():
        assert torch.equal(value.to_local(), ours[name].to_local()), name
    return {"path": path, "size": sum(file.stat().st_size for file in path.glob("rank-*"))}


def test_any_sharding_on_four_ranks_is_read_into_any_other(tmp_path: Path) -> None:
    result = run_ranks(_reshard, 4, str(tmp_path))[0]
    whole = torch.arange(11 * 6 * 2).reshape(11, 6, 2)
    blank = {name: torch.zeros_like(whole) for name in [*_SHARDINGS, "submesh"]}
    stages = {f"stage{rank}": torch.zeros(2, dtype=torch.int64) for rank in range(4)}
    load_checkpoint(result["path"], {**blank, **stages})
    assert all(torch.equal(value, whole) for value in blank.values())
    assert all(torch.equal(value, torch.full((2,), i)) for i, value in enumerate(stages.values()))
    # Replicas are written once: 8 tensors of 132 int64 and 4 stages of 2, the rest is headers.
    assert 0 < result["size"] - 8 * (8 * 132 + 4 * 2) < 8000


def _one_rank_fails(rank: int, world_size: int, root: str, culprit: int, error: Exception) -> tuple[str, str]:
    save_checkpoint(root, 1, {"a": torch.arange(4)}, {})
    original = safetensors_codec.append

    def full(*args: Any) -> int:
        original(*args)
        raise error

    tensors = {"a": distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (2,)), [Shard(0)])}
    if rank == culprit:
        safetensors_codec.append = full
    with pytest.raises(DiskError) as caught:
        save_checkpoint(root, 2, tensors, {}, keep_last=1)
    safetensors_codec.append = original
    dist.barrier()
    assert os.listdir(root) == ["step-00000001"]

    # The ranks are still in step: what only one of them gets wrong is an error of all, and then it works.
    with pytest.raises(CheckpointError) as refused:
        save_checkpoint(root, 2, tensors, {"loss": rank})
    save_checkpoint(root, 3, tensors, {}, keep_last=1)
    assert os.listdir(root) == ["step-00000003"]
    return str(caught.value), str(refused.value)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_full_disk_on_one_rank_is_an_error_of_all(tmp_path: Path, culprit: int) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for full, differs in run_ranks(_one_rank_fails, 2, str(tmp_path), culprit, error):
        assert "No space left on device" in full and f"rank {culprit} failed while writing" in full
        assert "Free some space" in full
        assert "the state differs from that of rank 0" in differs and "ranks=[1]" in differs.replace("'", "")


def _damaged_file(rank: int, world_size: int, root: str) -> tuple[Any, str, str, str]:
    mesh = init_device_mesh("cpu", (2,))
    tensors = {"a": distribute_tensor(torch.arange(7), mesh, [Shard(0)])}
    for step in (1, 2, 3):
        save_checkpoint(root, step, tensors, {}, {"rng": torch.zeros(rank)})
    if rank == 0:
        (Path(root) / "step-00000003" / "rank-00001.safetensors").unlink()
        damaged = Path(root) / "step-00000002" / "rank-00001.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 0x80
        damaged.write_bytes(data)
    dist.barrier()
    found = find_checkpoint(root)
    with pytest.raises(CheckpointError) as explicit:
        load_checkpoint(Path(root) / "step-00000002", tensors)
    wanted = {"a": torch.zeros(7), "only on rank 1": torch.zeros(1)} if rank else {"a": torch.zeros(7).long()}
    with pytest.raises(CheckpointError) as strict:
        load_checkpoint(found.path or "", wanted)
    partial = {"a": DTensor.from_local(torch.zeros(7).long(), mesh, [Partial()])}
    with pytest.raises(CheckpointError) as unreduced:
        load_checkpoint(found.path or "", partial)
    return found, str(explicit.value), str(strict.value), str(unreduced.value)


def test_damage_and_mistakes_are_the_same_error_on_all_ranks(tmp_path: Path) -> None:
    results = run_ranks(_damaged_file, 2, str(tmp_path))
    assert results[0][1:] == results[1][1:]
    found, explicit, strict, unreduced = results[0]
    assert found.path == tmp_path / "step-00000001"
    reasons = {path.name: reason for path, reason in found.rejected}
    assert list(reasons) == ["step-00000003", "step-00000002"]
    assert "rank-00001.safetensors: is not a file" in reasons["step-00000003"]
    assert "rank-00001.safetensors: its checksum should be" in reasons["step-00000002"]
    assert "rank-00001.safetensors" in explicit and "damaged" in explicit
    assert "='only on rank 1': 1 tensors of this run are not in the checkpoint" in strict
    assert "the run has float32 [7]" in strict
    assert "still awaits a reduction" in unreduced

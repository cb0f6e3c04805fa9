"""Experts that hooks count, against the routers' own choice and against what products really read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.torch.expert_loop import LoopBackend
from moe.accounting.bytes import step_bytes
from moe.accounting.passes import Batch, decode_batch
from moe.errors import ModelError
from moe.layer import moe_layers
from moe.types import Routing
from recipes.cap.decode import roll_out
from recipes.cap.hooks import ExpertTrace, check_sites, find_sites
from recipes.cap.loading import System
from tests.conftest import MakeCheckpoint, random_model
from tests.recipes.cap.cap_systems import CPU, MIXTURES, ReadExperts, graft_moe, load, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")


class RouterOutputs:
    """What routers put out, module by module and call by call, kept whole."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, list[Any]] = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in ("gate", "router") and "mlp.shared" not in name:
                module.register_forward_hook(
                    lambda m, args, output, name=name: self.calls.setdefault(name, []).append(output)
                )

    def distinct(self, top_k: int) -> list[list[int]]:
        """Of every pass, of every layer: ids looked at one by one."""
        layers = [[len(used_experts(output, top_k)) for output in calls] for calls in self.calls.values()]
        return [list(row) for row in zip(*layers, strict=True)]


def used_experts(output: Any, top_k: int) -> set[int]:
    """By hand, from whatever a router puts out."""
    if isinstance(output, Routing):
        used = set()
        for t in range(output.expert_ids_TK.shape[0]):
            for k in range(output.expert_ids_TK.shape[1]):
                if output.slot_mask_TK is None or bool(output.slot_mask_TK[t, k]):
                    used.add(int(output.expert_ids_TK[t, k]))
        return used
    whole = [part for part in output if isinstance(part, Tensor) and part.dtype == torch.int64]
    ids = whole[0] if whole else output[-1].topk(top_k, -1).indices
    return {int(index) for index in ids.flatten()}


@pytest.mark.parametrize("family", MIXTURES)
def test_counts_are_those_of_the_routers(family: str) -> None:
    model = random_model(family, **MIXTURES[family])
    if family != "jamba":  # its router is a linear layer, and the choice is made behind it
        routers = RouterOutputs(model)
    run = roll_out(model, some_ids(3, 7), 4, find_sites(model))
    assert run.distinct is not None and len(run.distinct) == 4
    found = [list(one.per_layer) for one in run.distinct]
    assert {one.source for one in run.distinct} == {"traced"}
    # a decode pass of 3 tokens uses from K to 3 K experts
    top_k = MIXTURES[family]["num_experts_per_tok"]
    assert all(top_k <= n <= 3 * top_k for row in found[1:] for n in row)
    if family != "jamba":
        assert found == routers.distinct(top_k)


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_compute_experts_is_seen(way: str) -> None:
    model = random_model("qwen3_moe", **MIXTURES["qwen3_moe"])
    model.set_experts_implementation(way)
    routers = RouterOutputs(model)
    run = roll_out(model, some_ids(2, 5), 3, find_sites(model))
    assert run.distinct is not None
    assert [list(one.per_layer) for one in run.distinct] == routers.distinct(2)


@pytest.mark.parametrize("router", ["topk", "deepseek_v3", "hash", "relu", "expert_choice"])
def test_grafts_own_layers(make_checkpoint: MakeCheckpoint, tmp_path: Path, router: str) -> None:
    system = load(graft_moe(make_checkpoint, tmp_path / "hf", router))
    outputs = RouterOutputs(system.model)
    run = roll_out(system.model, some_ids(3, 6), 3, system.sites)
    assert run.distinct is not None
    assert [list(one.per_layer) for one in run.distinct] == outputs.distinct(0)
    assert system.shape is not None and len(system.sites) == len(system.shape.moe) == 3


def test_masked_and_overflowing_slots_are_no_experts() -> None:
    # Four experts; a router of transformers gives id 4 to a slot that another rank computes.
    class Experts(nn.Module):
        num_experts = 4

        def forward(self, hidden: Tensor, top_k_index: Tensor) -> Tensor:
            return hidden

    model = nn.ModuleDict({"experts": Experts()})
    with ExpertTrace(find_sites(model), 2, CPU) as trace:
        trace.next_pass()
        model["experts"](torch.zeros(2, 1), torch.tensor([[0, 4], [0, 2]]))
        trace.next_pass()
        model["experts"](torch.zeros(1, 1), top_k_index=torch.tensor([[4, 4]]))
    model["experts"](torch.zeros(1, 1), torch.tensor([[1, 3]]))  # nobody watches any more
    assert [one.per_layer for one in trace.distinct()] == [(2,), (0,)]


def test_no_pass_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # What would synchronise on a GPU is not called while passes run: only once, at the end.
    model = random_model("mixtral", **MIXTURES["mixtral"])
    model.set_experts_implementation("batched_mm")
    copies = []
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("item() waits"))
    monkeypatch.setattr(Tensor, "tolist", lambda self, real=Tensor.tolist: copies.append(1) or real(self))
    with ExpertTrace(find_sites(model), 2, CPU) as trace, torch.no_grad():
        for _ in range(2):
            trace.next_pass()
            model(input_ids=some_ids(2, 4), use_cache=False)
        during = len(copies)
    trace.distinct()
    assert during == 0 < len(copies)


def test_mixtures_that_cannot_be_watched_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    system = load(make_checkpoint("mixtral", **MIXTURES["mixtral"]))
    assert system.shape is not None
    with pytest.raises(ModelError, match=r"modules have MoE layers of \[6, 6\] experts"):
        check_sites(system.sites[:2], system.shape, "x")


def eager(system: System) -> dict[str, nn.Parameter]:
    """Computes experts one by one; returns their stacked matrices."""
    if any(site.kind == "plan" for site in system.sites):
        for _, layer in moe_layers(system.model):
            layer.experts.backend = "loop"
    else:
        system.model.set_experts_implementation("eager")
    stacks = {}
    for site in system.sites:
        for name, parameter in site.module.named_parameters():
            if parameter.dim() == 3:
                stacks[f"{site.name}.{name}"] = parameter
    return stacks


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "glm4_moe", "olmoe"])
def test_bytes_are_those_that_a_decode_reads(make_checkpoint: MakeCheckpoint, family: str) -> None:
    check_bytes(load(make_checkpoint(family, **MIXTURES[family])))


def test_bytes_that_grafts_own_layers_read(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert LoopBackend.name == "loop"
    check_bytes(load(graft_moe(make_checkpoint, tmp_path / "hf")))


@torch.no_grad()
def check_bytes(system: System) -> None:
    """Products of one decode pass read exactly the experts' bytes that the accounting says."""
    stacks = eager(system)
    assert system.shape is not None and stacks
    prompt = system.model(input_ids=some_ids(3, 7), use_cache=True)
    with ExpertTrace(system.sites, 1, CPU) as trace, ReadExperts(stacks) as reads:
        trace.next_pass()
        system.model(input_ids=some_ids(3, 1, seed=1), past_key_values=prompt.past_key_values)
    distinct = trace.distinct()[0].per_layer
    assert reads.bytes() == step_bytes(system.shape, decode_batch(3, 8), distinct, system.bits).experts > 0
    one = step_bytes(system.shape, Batch((8,)), [1.0] * len(distinct), system.bits).experts
    assert reads.bytes() < one * max(site.num_experts for site in system.sites), "not every expert"

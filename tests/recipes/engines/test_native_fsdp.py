"""FSDP2 in detail: what stays fp32, what is sharded when it is saved, and compiled blocks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.engines.micro_batch import MicroBatch
from recipes.engines.native.native_engine import NativeConfig, NativeEngine
from recipes.runtime.interrupt import StopRequest
from recipes.training.callbacks.base import Callback, StageInfo
from recipes.training.training_loop import Loop
from tests.distributed_helper import run_ranks
from tests.recipes.engines.conftest import RunOnRanks
from tests.recipes.engines.engine_cases import (
    GLOBAL_BATCH,
    SEQ_LEN,
    Case,
    full,
    make_model,
    make_stage,
    open_engine,
    tokens,
)

_NO_COMPILER = "torch.compile needs a C++ compiler on CPU, and none is on the PATH"


@pytest.mark.distributed
def test_the_router_computes_in_fp32_when_the_rest_computes_in_bf16(run_on_ranks: RunOnRanks) -> None:
    for world_size in (1, 2):
        for name in ("bf16", "bf16_ddp"):
            notes = run_on_ranks(world_size)[0][name].notes
            assert notes["dtypes"]["router_weight"] == torch.float32
            assert notes["dtypes"]["router_logits"] == torch.float32
            assert notes["dtypes"]["combine_weights"] == torch.float32
            assert notes["dtypes"]["expert_output"] == torch.bfloat16
            assert set(notes["masters"].values()) == {torch.float32}
        # FSDP2 casts what it gathers; autocast leaves weights alone and casts them where they are used.
        assert run_on_ranks(world_size)[0]["bf16"].notes["dtypes"]["expert_weight"] == torch.bfloat16


@pytest.mark.distributed
def test_what_is_saved_is_sharded_after_an_evaluation_too(run_on_ranks: RunOnRanks) -> None:
    # A forward pass without backward leaves FSDP2's outermost weights gathered: they would be saved whole.
    for name in ("fsdp", "tied", "bf16", "muon"):
        notes = run_on_ranks(2)[0][name].notes
        for when in ("sharded", "sharded_after_eval"):
            plain = {key for key, sharded in notes[when].items() if not sharded}
            assert all(key.endswith(".step") for key in plain), (name, when, plain)
            assert any(key == "model.model.embed_tokens.weight" for key in notes[when])
    replicated = run_on_ranks(2)[0]["ddp"].notes["sharded"]
    assert not any(replicated.values())


@pytest.mark.distributed
def test_tied_embeddings_are_saved_once(run_on_ranks: RunOnRanks) -> None:
    for world_size in (1, 2):
        outcomes = run_on_ranks(world_size)[0]
        assert "model.lm_head.weight" not in outcomes["tied"].notes["sharded"]
        assert "model.lm_head.weight" in outcomes["fsdp"].notes["sharded"]


@pytest.mark.distributed
def test_logits_are_of_the_trained_weights(run_on_ranks: RunOnRanks) -> None:
    # The weights that are exported, put into a fresh model, say what the engine's model says.
    for world_size, name in ((1, "fsdp"), (2, "fsdp"), (2, "ddp"), (2, "tied"), (2, "biases")):
        outcome = run_on_ranks(world_size)[0][name]
        case = {"tied": Case(model={"tie_word_embeddings": True}), "biases": Case(family="gpt2")}
        model = make_model(case.get(name, Case())).module.eval()
        missing, unexpected = model.load_state_dict(outcome.weights, strict=False)
        assert unexpected == [] and set(missing) <= ({"lm_head.weight"} if name != "fsdp" else set())
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens(900, 2))[:, :-1]).logits
        assert torch.allclose(logits, outcome.logits, rtol=1e-5, atol=1e-5), (world_size, name)


def _one_rank_differs(rank: int, world_size: int) -> tuple[dict[str, bool], int]:
    """A gradient that is not finite, and then a stop request, on one rank alone."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    return _refuse_step(rank), _stop(rank)


def _stop(rank: int) -> int:
    """The step after which a run of eight ends."""
    case = Case(micro=4, steps=8)
    engine = open_engine()
    stop = StopRequest()
    stage_steps = []

    class AskOnce(Callback):
        def on_row(self, stage: StageInfo, row: Mapping[str, float], load: Any) -> None:
            stage_steps.append(row["step"])
            stop.requested = stop.requested or (rank == 1 and row["step"] == 2)

    with tempfile.TemporaryDirectory() as folder:
        stage = make_stage(case, engine.prepare(make_model(case), case.optim), Path(engine.broadcast(folder)))
        result = Loop(engine, [AskOnce()], stop).run(stage)
        engine.barrier()
    assert not result.finished and result.step == stage_steps[-1]
    return result.step


def _refuse_step(rank: int) -> dict[str, bool]:
    same = {}
    for strategy in ("fsdp", "ddp"):
        case = Case()
        train_module = open_engine(strategy=strategy).prepare(make_model(case), case.optim)
        before = {name: full(tensor) for name, tensor in train_module.full_tensors()}
        train_module.forward_backward([MicroBatch(torch.from_numpy(tokens(4 * rank, 4)))])
        if rank == 1:
            grad = next(p.grad for p in train_module.model.module.parameters() if p.grad is not None)
            (grad.to_local() if strategy == "fsdp" else grad).flatten()[0] = float("nan")
        if strategy == "ddp":  # DDP's gradients are equal on all ranks by then
            for p in train_module.model.module.parameters():
                torch.distributed.all_reduce(p.grad)
        norm = train_module.step(1.0)
        assert not torch.isfinite(norm), f"{strategy}: {norm}"
        assert train_module.model.context.step == 0
        assert all(p.grad is None for p in train_module.model.module.parameters())
        after = {name: full(tensor) for name, tensor in train_module.full_tensors()}
        same[strategy] = all(torch.equal(after[name], weight) for name, weight in before.items())
    return same


@pytest.mark.distributed
def test_all_ranks_heed_what_only_one_has_seen() -> None:
    # A gradient that is not finite updates nothing anywhere; a signal at step 2 makes step 3 the last of all.
    assert run_ranks(_one_rank_differs, 2) == [({"fsdp": True, "ddp": True}, 3)] * 2


def _compiled_and_eager(rank: int, world_size: int) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients of one batch: validation would compile every block once more."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    found = {}
    for name in ("eager", "compiled"):
        case = Case(model={"num_hidden_layers": 1})
        engine = open_engine(compile=name == "compiled")
        train_module = engine.prepare(make_model(case), case.optim)
        (loss,) = train_module.forward_backward([MicroBatch(torch.from_numpy(tokens(0, GLOBAL_BATCH)))])
        grads = {key: full(p.grad) for key, p in train_module.model.module.named_parameters()}
        layer = train_module.model.moe_layers()[0][1]
        assert [float(sums[-4]) for sums in layer.stats.sums.values()] == [GLOBAL_BATCH * SEQ_LEN]
        found[name] = float(loss), grads
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0, "nothing was compiled"
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason=_NO_COMPILER)
def test_compiled_blocks_compute_what_eager_ones_do() -> None:
    outcome = run_ranks(_compiled_and_eager, 1)[0]
    (eager_loss, eager), (compiled_loss, compiled) = outcome["eager"], outcome["compiled"]
    # Fused kernels sum in another order: the bound of test_native_ranks.
    assert compiled_loss == pytest.approx(eager_loss, rel=5e-6)
    for name, grad in eager.items():
        assert float((compiled[name] - grad).abs().max()) <= 5e-6 * float(grad.abs().max()), name


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert NativeEngine.check(NativeConfig()) is None
    assert "torch sees no GPU" in str(NativeEngine.check(NativeConfig(device="cuda")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "2 ranks on this machine and 1 GPUs" in str(NativeEngine.check(NativeConfig()))
    with pytest.raises(ValueError, match="threads=0: must be 1 to 4096"):
        NativeConfig(threads=0)

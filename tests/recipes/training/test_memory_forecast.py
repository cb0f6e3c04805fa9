"""Memory that is foreseen: counted where it can be, else hand-worked; what has no room is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.engines.base import HeldShares
from recipes.engines.deepspeed.config import DeepSpeedConfig
from recipes.engines.deepspeed.deepspeed_engine import DeepSpeedEngine
from recipes.engines.megatron.config import MegatronConfig
from recipes.engines.megatron.megatron_engine import MegatronEngine
from recipes.engines.native.config import NativeConfig
from recipes.engines.native.native_engine import NativeEngine
from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.optimizer import build_optimizer, state_elements
from recipes.jobs.memory_check import Machine, _lines, _refusal
from recipes.models.hf.hf_model import HFModel
from recipes.training.memory_forecast import MemoryForecast, Passes, forecast
from tests.conftest import MakeCheckpoint, random_model
from tests.grid import each
from tests.recipes.jobs.job_runs import job, write_text

GIB = 2.0**30
ALL = (1.0, 1.0)
V, D, F, LAYERS, T = 300, 32, 48, 3, 20


def dense() -> HFModel:
    """A Llama without memory."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
    )
    with torch.device("meta"):
        return HFModel(AutoModelForCausalLM.from_config(config), Path("dense"), torch.float32)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_is_that_which_the_optimizer_makes(name: str) -> None:
    module, optim = random_model("llama"), OptimConfig(name=name)
    made = build_optimizer(module, optim)
    made.materialise_state()
    state = [t for one in made.optimizers for held in one.state.values() for t in held.values() if t.ndim]
    assert state_elements(module, optim, set()) == (sum(t.numel() for t in state), 0)


def test_parts_of_a_dense_model_by_hand() -> None:
    model = dense()
    params = sum(p.numel() for p in model.module.parameters())
    passes = Passes(T, 4, recomputes=False, accumulates=False, device="cpu")
    found = forecast(model, OptimConfig(), HeldShares(ALL, ALL, ALL), passes)
    assert (found.weights, found.gradients, found.optimizer) == (4 * params, 4 * params, 8 * params)
    # queries, keys, values and output of width D; gate, up, down and the activation of width F
    assert found.activations == 4 * T * LAYERS * (6 * D + 4 * D + 4 * F)
    assert found.logits == 12 * T * V
    assert found.buffers == 0
    again = forecast(model, OptimConfig(), HeldShares(ALL, ALL, ALL), Passes(T, 4, True, True, "cpu"))
    assert again.activations == 4 * T * (LAYERS * D + 10 * D + 4 * F)
    assert again.total == again.fixed + again.activations + again.logits


def test_logits_are_those_of_a_part_and_a_gradient_of_the_head() -> None:
    # 2**24 // 300 tokens have logits at once; a part's gradient of the head comes on top.
    passes, rows = Passes(100_000, 2, False, False, "cuda"), 55_924
    found = forecast(dense(), OptimConfig(), HeldShares(ALL, ALL, ALL), passes)
    assert found.logits == 14 * rows * V + 4 * V * D


@each("device, tokens, extra", [("cpu", 10_000, 16), ("cpu", 0, 0), ("cuda", 10_000, 0)])
def test_gathered_layers_leave_holes_in_a_cpus_heap(device: str, tokens: int, extra: int) -> None:
    model, held = dense(), HeldShares(ALL, ALL, ALL, gathers=True)
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.module.model.layers]
    gathered = sum(p.numel() for p in model.module.parameters()) - sum(blocks) + 2 * blocks[0]
    found = forecast(model, OptimConfig(), held, Passes(tokens, 2, False, False, device))
    assert found.buffers == gathered * (2 + 4 + extra)


HELD = [
    (NativeEngine, NativeConfig(), False, HeldShares((0.25, 0.25), (0.25, 0.25), (0.25, 0.25), gathers=True)),
    (NativeEngine, NativeConfig(strategy="ddp"), True, HeldShares(ALL, ALL, ALL, copies=ALL)),
    (DeepSpeedEngine, DeepSpeedConfig(zero_stage=0), True, HeldShares(ALL, ALL, ALL, copies=ALL)),
    (
        MegatronEngine,
        MegatronConfig(tensor_parallel=2),
        True,
        HeldShares((0.5, 1.0), (0.5, 1.0), (0.25, 0.25)),
    ),
]


@each("engine, config, several, held", HELD)
def test_shares_of_four_ranks(engine: type, config: object, several: bool, held: HeldShares) -> None:
    assert engine.held_shares(config, 4, accumulates=several) == held


def test_gradients_of_earlier_micro_batches_wait_whole() -> None:
    held = NativeEngine.held_shares(NativeConfig(expert_parallel=2), 4, accumulates=True)
    assert held.copies == (1.0, 0.5) and held.expert_ranks == 2


def test_what_cannot_fit_is_refused_and_what_may_not_is_advised() -> None:
    found = MemoryForecast(1 * GIB, 1 * GIB, 2 * GIB, 3 * GIB, 1 * GIB, 0.5 * GIB, accumulates=True)
    assert (found.fixed, found.total) == (4 * GIB, 8.5 * GIB)
    (line,) = _lines("moe", found, Machine(2, int(17 * GIB), 0, "this machine"), GIB)
    assert "8.50 a rank x 2 ranks = 17.00, of 17.00 free on this machine: weights 1.00" in line
    lines = _lines("moe", found, Machine(2, int(16 * GIB), 0, "this machine"), GIB)
    assert "may not fit. Set engine.activation_checkpointing=true, or a smaller train.micro" in lines[1]
    assert _refusal(found, Machine(2, int(7 * GIB), int(GIB), "this machine")) is None
    refusal = str(_refusal(found, Machine(2, int(6 * GIB), int(GIB), "this machine")))
    assert refusal.startswith(
        "memory='4.00 GiB a rank': weights, gradients and optimizer state of 2 ranks need"
    )
    assert "need 8.00 GiB, and 6.00 GiB are free" in refusal


@pytest.mark.parametrize("method", ["copy", "llama_moe"])
def test_what_cannot_fit_is_refused_before_there_is_a_run(
    method: str, tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dense": make_checkpoint("llama"), "data.path": write_text(tmp_path / "text")}
    options |= {"upcycle": method, "train.steps": 0}
    monkeypatch.setattr("recipes.jobs.memory_check.free_and_total_bytes", lambda: (10_000, 20_000))
    monkeypatch.setattr("recipes.jobs.memory_check.psutil", SimpleNamespace(Process=_of_no_size))
    refused = job(tmp_path, options)
    assert refused.code == 2 and refused.err.startswith("error: memory="), refused.err
    assert not (tmp_path / "outputs").exists()


def _of_no_size() -> SimpleNamespace:
    return SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))


def test_a_run_says_what_it_will_take_and_does_not_begin_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data.path": write_text(tmp_path / "text"), "train.steps": 1, "compare.cpt": False}
    done = job(tmp_path, options | {"optim.schedule.warmup_steps": 0})
    assert done.code == 0, done.err
    assert done.out.count("memory foreseen, in GiB:") == 1
    # Weights of 212 KB, gradients and two moments take 848 KB, and 459 KB where experts train factors alone.
    monkeypatch.setattr(
        "recipes.jobs.memory_check._machine", lambda run: Machine(1, 650_000, 0, "this machine")
    )
    refused = job(tmp_path, options | {"optim.schedule.warmup_steps": 0})
    assert refused.code == 2 and "error: memory=" in refused.err, refused.err
    assert not (tmp_path / "outputs" / "upcycle-2").exists()
    done = job(tmp_path, options | {"optim.schedule.warmup_steps": 0, "experts.lora.rank": 2})
    assert done.code == 0, done.err

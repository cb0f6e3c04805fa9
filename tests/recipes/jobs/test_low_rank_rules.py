"""What is told of low-rank factors before a run starts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe.upcycle.dense_shape import FFNShape
from recipes.config.compose import compose_config
from recipes.config.schema import RunConfig, parse_config
from recipes.engines import engine_classes
from recipes.jobs.expert_rules import check_backend
from recipes.jobs.identity import identity
from recipes.jobs.low_rank_rules import check_low_rank
from recipes.jobs.pretrain_job import PretrainJob
from recipes.jobs.upcycle_job import UpcycleJob
from recipes.jobs.upcycle_vs_cpt_job import UpcycleVsCPTJob

SHAPE = FFNShape(width=48, model_width=32, gated=True, activation="silu")


def _parsed(*overrides: str, recipe: str = "upcycle") -> RunConfig:
    return parse_config(compose_config([f"+recipe={recipe}", "engine.device=cpu", *overrides]))


def _told(config: RunConfig, shape: FFNShape | None = SHAPE) -> list[str]:
    return [str(mistake) for mistake in check_low_rank(config, shape) + check_backend(config, shape)]


def test_without_a_rank_nothing_is_asked() -> None:
    assert _parsed().experts.lora.rank == 0
    assert _told(_parsed("router=avg_k", "optim.start_from=/nowhere")) == []
    assert _told(_parsed("experts.lora.rank=32")) == []


def test_every_mistake_is_told_at_once() -> None:
    options = ("experts.lora.rank=33", "router=avg_k", "optim.start_from=/nowhere")
    router, start, rank = _told(_parsed(*options))
    assert router.startswith("router.name='avg_k': it reads the experts' weights")
    assert start.startswith("optim.start_from='/nowhere': it holds the state of weights that do not train")
    assert rank.startswith("experts.lora.rank=33: the experts' matrices have widths of 32 and 48")
    assert rank.endswith("Set 32 or less; 8 to 64 are usual.")
    assert _told(_parsed(*options), None) == [router, start]


def test_a_back_end_that_cannot_run_the_rank_is_named() -> None:
    forced = "experts.backend=grouped_mm"
    assert _told(_parsed(forced, "experts.lora.rank=4")) == []
    (told,) = _told(_parsed(forced, "experts.lora.rank=4", "engine.precision=bf16"))
    assert told.startswith(
        "experts.backend='grouped_mm': the rank of the low-rank factors 4 is not a multiple"
    )


def test_a_back_end_that_cannot_run_here_is_named_with_and_without_a_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forced = "experts.backend=triton"
    (told,) = _told(_parsed(forced))
    assert told.startswith("experts.backend='triton': it runs on GPUs; on a CPU only under Triton's")
    # An unknown family has no shape, and the machine is the same.
    assert _told(_parsed(forced, "experts.lora.rank=4")) == _told(_parsed(forced), None) == [told]
    (missing,) = _told(_parsed("experts.backend=scattermoe"))
    assert "is not installed" in missing and missing.endswith("Install it, or set experts.backend=auto.")
    (bias,) = _told(_parsed("experts.backend=grouped_mm"), replace(SHAPE, down_bias=True))
    assert bias == "experts.backend='grouped_mm': F.grouped_mm takes no bias. Set experts.backend=auto."
    # The dense network's width is not that of its experts, which may be a multiple of 16 bytes.
    assert _told(_parsed("experts.backend=grouped_mm"), replace(SHAPE, width=47)) == []


def test_what_engines_cannot_do_is_told_by_them() -> None:
    def told(*overrides: str) -> list[str]:
        config = _parsed("experts.lora.rank=8", *overrides)
        engine = engine_classes()[config.engine.name]
        found = [str(mistake) for mistake in engine.check_run(config.engine, config)]
        return [line for line in found if line.startswith("experts.lora.rank=8")]

    zero = ("engine=deepspeed", "engine.zero_stage=3")
    assert told() == told("engine=megatron") == told(*zero) == []
    (spread,) = told(*zero, "engine.expert_parallel=2")
    assert "ZeRO-3 cannot shard expert-parallel experts if some of their weights are frozen" in spread
    (theirs,) = told("engine=megatron", "engine.experts=megatron")
    assert "Megatron's own experts have no low-rank factors" in theirs


def test_jobs_that_train_all_weights_refuse_factors() -> None:
    rank = "experts.lora.rank=8"
    for job, recipe in ((PretrainJob, "pretrain"), (UpcycleVsCPTJob, "upcycle_vs_cpt")):
        told = [str(mistake) for mistake in job().check(_parsed(rank, recipe=recipe), 1)]
        assert [line for line in told if line.startswith(rank)], (job.name, told)
    assert not [m for m in UpcycleJob().check(_parsed(rank), 1) if m.path.startswith("experts")]


def test_a_run_goes_on_with_the_factors_that_it_began_with() -> None:
    class Data:
        fingerprint = "same"

    def fields(*overrides: str) -> dict[str, object]:
        return identity(_parsed(*overrides), "dense", Data())  # type: ignore[arg-type]

    plain = fields()
    assert not [path for path in plain if path.startswith("experts")]
    changed = fields("experts.lora.rank=8", "experts.lora.alpha=4")
    assert {path: changed[path] for path in set(changed) - set(plain)} == {
        "experts.lora.rank": 8,
        "experts.lora.alpha": 4.0,
    }

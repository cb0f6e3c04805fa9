"""Schedules, parameter groups, saved state and clipping on one rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from recipes.engines.optim.config import GROUPS, FrozenConfig, MuonConfig, OptimConfig
from recipes.engines.optim.optimizer import (
    OptimizerSet,
    ScheduleConfig,
    build_optimizer,
    clip_grad_norm,
    group_parameters,
    lr_factor,
)

VOCAB, WIDTH, EXPERTS, FFN = 11, 6, 3, 4


class Router(nn.Module):
    parameter_role = "router"

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, EXPERTS)


class Experts(nn.Module):
    parameter_role = "expert"
    fused_rows: ClassVar[Mapping[str, int]] = {"gate_up": 2}

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * FFN, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, FFN))
        self.bias = nn.Parameter(torch.zeros(EXPERTS, WIDTH))


class TinyMoE(nn.Module):
    """Every kind of parameter that the groups tell apart, with dense routing."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.router = Router()
        self.experts = Experts()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.proj(self.embed(ids))
        x = self.norm(x + self.conv(x.mT).mT)
        weight = self.router.project(x).softmax(-1)
        gate, up = torch.einsum("bsd,efd->bsef", x, self.experts.gate_up).chunk(2, dim=-1)
        y = torch.einsum("bsef,edf->bsed", torch.nn.functional.silu(gate) * up, self.experts.down)
        return self.lm_head(x + ((y + self.experts.bias) * weight[..., None]).sum(-2))


def tiny(seed: int = 0, tied: bool = False) -> TinyMoE:
    torch.manual_seed(seed)
    return TinyMoE(tied)


def train(model: nn.Module, optimizer: OptimizerSet, steps: range, schedule: ScheduleConfig) -> None:
    for step in steps:
        ids = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(step))
        optimizer.set_lr_factor(lr_factor(step, 6, schedule))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_groups_by_use() -> None:
    assert group_parameters(tiny()) == {
        "embeddings": ["embed.weight"],
        "matrices": ["proj.weight"],
        "vectors": ["proj.bias", "norm.weight", "norm.bias"],
        "tensors": ["conv.weight"],
        "router": ["router.project.weight", "router.project.bias"],
        "experts": ["experts.gate_up", "experts.down"],
        "expert_biases": ["experts.bias"],
        "head": ["lm_head.weight"],
    }


def test_a_tied_embedding_is_an_embedding_once() -> None:
    groups = group_parameters(tiny(tied=True))
    assert groups["embeddings"] == ["embed.weight"]
    assert "head" not in groups


def test_frozen_parameters_are_left_out() -> None:
    model = tiny()
    model.experts.requires_grad_(False)
    assert not {"experts", "expert_biases"} & set(group_parameters(model))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Unfreeze"):
        build_optimizer(model, OptimConfig())


def test_an_unknown_role_is_refused() -> None:
    model = tiny()
    model.proj.parameter_role = "expart"
    with pytest.raises(ValueError, match="proj.parameter_role='expart'"):
        group_parameters(model)


def test_a_meta_parameter_is_refused() -> None:
    with torch.device("meta"):
        model = TinyMoE()
    with pytest.raises(ValueError, match="embed.weight is on the meta device"):
        build_optimizer(model, OptimConfig())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_and_decay_of_every_group(name: str) -> None:
    config = OptimConfig(
        name=name, lr=1.0, router_lr_scale=0.5, expert_lr_scale=2.0, muon=MuonConfig(lr_scale=3.0)
    )
    hidden = 3.0 if name == "muon" else 1.0
    optimizer = build_optimizer(tiny(), config)
    optimizer.set_lr_factor(0.5)
    expected = {
        "embeddings": 0.5,
        "matrices": 0.5 * hidden,
        "vectors": 0.5,
        "tensors": 0.5,
        "router": 0.25,
        "experts": 1.0 * hidden,
        "expert_biases": 1.0,
        "head": 0.5,
    }
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == expected
    decayed = {group["name"] for group in optimizer.param_groups if group["weight_decay"]}
    assert decayed == {"experts", "matrices", "tensors", "head"}
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == len(list(tiny().parameters()))


def test_muon_takes_hidden_matrices_and_experts_with_their_blocks() -> None:
    optimizer = build_optimizer(tiny(), OptimConfig(name="muon"))
    muon = {(g["name"], g["blocks"]) for g in optimizer.optimizers[1].param_groups}
    assert muon == {("matrices", 1), ("experts", 1), ("experts", 2)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resume_is_bit_identical(name: str) -> None:
    config = OptimConfig(name=name, lr=0.01)
    straight, stopped = tiny(), tiny()
    train(straight, build_optimizer(straight, config), range(6), config.schedule)

    first = build_optimizer(stopped, config)
    train(stopped, first, range(3), config.schedule)
    saved = {key: value.clone() for key, value in first.state_tensors(stopped.named_parameters()).items()}
    resumed = tiny(seed=9)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    second = build_optimizer(resumed, config)
    live = second.state_tensors(resumed.named_parameters())
    assert live.keys() == saved.keys()
    for key, value in live.items():
        value.copy_(saved[key])
    train(resumed, second, range(3, 6), config.schedule)
    for (key, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_materialised_state_is_what_the_first_step_makes(name: str) -> None:
    early, late = tiny(), tiny()
    config = OptimConfig(name=name)
    a, b = build_optimizer(early, config), build_optimizer(late, config)
    a.materialise_state()
    for model, optimizer in ((early, a), (late, b)):
        train(model, optimizer, range(1), config.schedule)
    ours, theirs = (o.state_tensors(m.named_parameters()) for o, m in ((a, early), (b, late)))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_groups_stay_and_then_begin_afresh(name: str) -> None:
    """Steps 0 and 1 leave the experts alone; step 2 is to them what a first step is."""
    frozen = OptimConfig(name=name, frozen=FrozenConfig(2), clip_norm=None)
    model, plain = tiny(), tiny()
    optimizer = build_optimizer(model, frozen)
    before = {key: value.clone() for key, value in model.named_parameters()}
    ids = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    for step in range(3):
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        if step == 2:
            plain.load_state_dict(model.state_dict())
            for (_, param), (_, other) in zip(
                model.named_parameters(), plain.named_parameters(), strict=True
            ):
                other.grad = None if param.grad is None else param.grad.clone()
        optimizer.drop_frozen(step)
        optimizer.step()
        optimizer.zero_grad()
        if step < 2:
            for key, value in model.named_parameters():
                assert torch.equal(value, before[key]) == ("experts." in key), (step, key)
    fresh = build_optimizer(plain, replace(frozen, frozen=FrozenConfig()))
    fresh.step()
    for key in ("experts.gate_up", "experts.down", "experts.bias"):
        assert torch.equal(model.get_parameter(key), plain.get_parameter(key)), key


def test_frozen_gradients_do_not_count_in_the_norm() -> None:
    model = tiny()
    optimizer = build_optimizer(model, OptimConfig(frozen=FrozenConfig(1, ("experts",))))
    ids = torch.arange(10).view(2, 5) % VOCAB
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    rest = [p.grad for n, p in model.named_parameters() if n not in ("experts.gate_up", "experts.down")]
    wanted = torch.stack([g.norm() for g in rest if g is not None]).norm()
    optimizer.drop_frozen(0)
    torch.testing.assert_close(clip_grad_norm(model.parameters(), None), wanted)


def test_state_names() -> None:
    model = tiny(tied=True)
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    names = optimizer.state_tensors(model.named_parameters())
    assert {n for n in names if "embed" in n} == {
        "optim.embed.weight.step",
        "optim.embed.weight.exp_avg",
        "optim.embed.weight.exp_avg_sq",
    }
    assert {n for n in names if "experts.down" in n} == {"optim.experts.down.momentum_buffer"}
    with pytest.raises(ValueError, match="1 trained parameters have no name"):
        optimizer.state_tensors((n, p) for n, p in model.named_parameters() if n != "proj.weight")


def test_fused_adamw_is_adamw() -> None:
    # Plain AdamW, one tensor at a time. Fused rounds in another order; one step moves a weight by about lr.
    config = OptimConfig(lr=0.01, clip_norm=None)
    ours, theirs = tiny(), tiny()
    optimizer = build_optimizer(ours, config)
    decayed = {n for k, v in group_parameters(theirs).items() if k in DECAYED for n in v}
    plain = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if n in decayed else 0.0} for n, p in theirs.named_parameters()],
        lr=0.01,
        betas=config.betas,
        eps=config.eps,
        foreach=False,
    )
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=3 * 2**-23, atol=3 * 0.01 * 2**-20)


DECAYED = ("experts", "matrices", "tensors", "head")


def test_cosine_by_hand() -> None:
    schedule = ScheduleConfig("cosine", warmup_steps=2, min_lr_ratio=0.2)
    # 7 steps, the last is step 6: warm-up 1/3, 2/3; then progress 0, 1/4, 2/4, 3/4, 1 over steps 2..6.
    half = math.sqrt(0.5)
    expected = [1 / 3, 2 / 3, 1.0, 0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half), 0.2]
    assert [lr_factor(s, 7, schedule) for s in range(7)] == pytest.approx(expected)
    assert lr_factor(100, 7, schedule) == pytest.approx(0.2)


def test_wsd_by_hand() -> None:
    schedule = ScheduleConfig("wsd", warmup_steps=1, decay_fraction=0.4, min_lr_ratio=0.0)
    # 10 steps, decay over round(0.4 * 10) = 4: step 5 is the last at 1, steps 6..9 have 3/4, 2/4, 1/4, 0.
    expected = [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [lr_factor(s, 10, schedule) for s in range(10)] == pytest.approx(expected)


def test_constant_by_hand() -> None:
    schedule = ScheduleConfig("constant", warmup_steps=1)
    assert [lr_factor(s, 3, schedule) for s in range(3)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_one_step_runs(kind: str) -> None:
    assert 0 < lr_factor(0, 1, ScheduleConfig(kind)) <= 1


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps=5: does not fit: the run has 5 steps"):
        lr_factor(0, 5, ScheduleConfig(warmup_steps=5))
    with pytest.raises(ValueError, match="and the decay takes 4. Lower warmup_steps"):
        ScheduleConfig("wsd", warmup_steps=6, decay_fraction=0.4).check(10)
    ScheduleConfig("constant", warmup_steps=50).check(10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "sgd"}, "Choose adamw or muon"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"router_lr_scale": -1.0}, "router_lr_scale=-1.0"),
        ({"expert_lr_scale": -1.0}, "expert_lr_scale=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": 0.0}, "eps=0.0"),
        ({"clip_norm": 0.0}, "Give null"),
    ],
)
def test_optim_mistakes(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(OptimConfig(), **change)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        OptimConfig(lr=-1.0, eps=0.0)
    assert len(str(caught.value).splitlines()) == 2
    for wrong in ({"kind": "step"}, {"warmup_steps": -1}, {"decay_fraction": 0.0}, {"min_lr_ratio": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ScheduleConfig(**wrong)
    for wrong in ({"steps": -1}, {"groups": ("expert",)}, {"groups": GROUPS}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FrozenConfig(**wrong)
    for wrong in ({"lr_scale": -1}, {"momentum": 1.0}, {"ns_steps": 0}, {"adjustment": "rms"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MuonConfig(**wrong)


def test_clip_by_hand() -> None:
    a, b, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    # sqrt(1 + 4 + 4 + 16) = 5
    assert clip_grad_norm([a, b, unused], None) == 5.0
    assert clip_grad_norm([a, b, unused], 10.0) == 5.0
    assert torch.equal(a.grad, torch.tensor([1.0, 2.0]))
    assert clip_grad_norm([a, b, unused], 1.0) == 5.0
    torch.testing.assert_close(a.grad, torch.tensor([0.2, 0.4]))
    assert clip_grad_norm([unused], 1.0) == 0.0


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_told(wrong: float) -> None:
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    a.grad, b.grad = torch.tensor([1.0, wrong]), torch.tensor([2.0, 4.0])
    assert not torch.isfinite(clip_grad_norm([a, b], 1.0))
    assert torch.equal(b.grad, torch.tensor([2.0, 4.0]))


def test_clip_takes_mixed_dtypes() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)
    assert clip_grad_norm([a, b], 1.0) == 5.0
    assert b.grad.item() == pytest.approx(0.8, rel=2**-8)

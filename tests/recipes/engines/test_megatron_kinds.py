"""Kinds of experts and dispatchers of the Megatron engine: what each needs, and what is said without it.

`test_megatron` trains with them; nothing here needs megatron-core.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe.routers.configs.mod_config import MoDConfig
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.engines.megatron import expert_kinds as found
from recipes.engines.megatron.dispatchers import DispatchSetup, dispatchers
from recipes.engines.megatron.expert_kinds import expert_kinds
from recipes.engines.megatron.megatron_engine import MegatronConfig, MegatronEngine
from tests.recipes.engines.megatron_stand_ins import Buffer, GroupedLinear, HybridEPBuffer

FITS = DispatchSetup("cuda", "bf16", 2)
_PACKAGES = ("deep_ep", "transformer_engine", "transformer_engine.pytorch")


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _PACKAGES:
        # What python does where there is no such package.
        monkeypatch.setitem(sys.modules, name, None)


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)


def _told(name: str, setup: DispatchSetup) -> list[str]:
    return [str(mistake) for mistake in dispatchers()[name].mistakes(setup)]


def test_what_torch_sends_runs_everywhere() -> None:
    for name in ("alltoall", "allgather"):
        assert _told(name, DispatchSetup("cpu", "fp32", 1)) == _told(name, FITS) == []
    assert list(dispatchers()) == ["alltoall", "allgather", "deepep", "hybridep"]
    for name in ("graft", "megatron"):
        assert expert_kinds()[name].mistakes("cpu") == []


@pytest.mark.parametrize("name", expert_kinds())
def test_every_kind_is_described_and_names_itself_where_it_cannot_be_used(name: str) -> None:
    kind = expert_kinds()[name]
    assert kind.summary and all(key.isidentifier() for key in kind().fields())
    for device in ("cpu", "cuda"):
        for mistake in kind.mistakes(device):
            assert (
                (mistake.path, mistake.value) == ("engine.experts", name) and mistake.rule and mistake.remedy
            )


def test_a_kind_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (Path(found.__path__[0]) / "graft_experts.py").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(text.replace('name = "graft"', 'name = "mine"'), encoding="utf-8")
    monkeypatch.setattr(found, "__path__", [*found.__path__, str(tmp_path)])
    assert list(expert_kinds()) == ["graft", "megatron", "mine", "te"]


@pytest.mark.parametrize("name", ["deepep", "hybridep"])
def test_deepep_names_all_that_it_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, ranks, precision = _told(name, DispatchSetup("cpu", "fp32", 1))
    assert device == (
        f"engine.dispatcher={name!r}: its kernels run on GPUs, and the run on cpu. "
        "Set engine.dispatcher=alltoall."
    )
    assert "engine.expert_parallel=1 leaves every expert on every rank: nothing travels" in ranks
    assert "its kernels add bf16 alone, and engine.precision is fp32" in precision
    (missing,) = _told(name, FITS)
    assert "DeepEP cannot be used here" in missing and "deep_ep" in missing
    _install(monkeypatch, "deep_ep", Buffer=Buffer)
    assert _told("deepep", FITS) == []
    (missing,) = _told("hybridep", FITS)
    assert "has no attribute 'HybridEPBuffer'" in missing
    (uneven,) = _told("deepep", DispatchSetup("cuda", "bf16", 3))
    assert "(engine.expert_parallel=3: Unsupported number of EP ranks: 3)" in uneven
    _install(monkeypatch, "deep_ep", HybridEPBuffer=HybridEPBuffer)
    assert _told("hybridep", FITS) == []


def test_transformer_engine_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = expert_kinds()["te"]
    (device,) = kind.mistakes("cpu")
    assert str(device) == (
        "engine.experts='te': TransformerEngine computes on GPUs, and the run on cpu. "
        "Set engine.experts=graft, or megatron."
    )
    (missing,) = kind.mistakes("cuda")
    assert "TransformerEngine cannot be used here" in str(missing)
    _install(monkeypatch, "transformer_engine")
    _install(monkeypatch, "transformer_engine.pytorch")
    (old,) = kind.mistakes("cuda")
    assert "has no attribute 'GroupedLinear'" in str(old)
    _install(monkeypatch, "transformer_engine.pytorch", GroupedLinear=GroupedLinear)
    assert kind.mistakes("cuda") == []


def test_deepep_takes_as_many_experts_of_a_token_as_its_kernels_hold() -> None:
    fields = {name: each.fields(64, 8) for name, each in dispatchers().items()}
    assert fields["alltoall"] == {"moe_token_dispatcher_type": "alltoall", "moe_router_topk": 8}
    assert fields["hybridep"]["moe_router_topk"] == fields["deepep"]["moe_router_topk"] == 8
    # All, where they hold all: routers need not name the same number for every token.
    assert dispatchers()["deepep"].fields(16, 2)["moe_router_topk"] == 16
    assert dispatchers()["deepep"].most_experts(128, 64) == 32
    assert dispatchers()["hybridep"].most_experts(128, 64) is None


def test_deepep_among_many_experts_needs_weights_above_0() -> None:
    deepep = dispatchers()["deepep"]
    (mistake,) = deepep.route_mistakes(33, MoDConfig())
    assert "router=mod with gate=linear gives negative ones" in str(mistake)
    for experts, gate in ((32, "linear"), (33, "sigmoid")):
        assert deepep.route_mistakes(experts, MoDConfig(gate=gate)) == []  # type: ignore[arg-type]


def test_a_run_is_told_all_of_it_before_it_starts() -> None:
    for wrong in ("experts", "dispatcher"):
        with pytest.raises(ValueError, match=rf"{wrong}='none': there is none of this name\. Choose one"):
            MegatronConfig(**{wrong: "none"})  # type: ignore[arg-type]
    overrides = ["+recipe=upcycle", "engine=megatron", "engine.device=cpu", "experts.lora.rank=4"]
    overrides += ["engine.experts=te", "engine.dispatcher=deepep", "engine.expert_parallel=2"]
    run = parse_config(compose_config([*overrides, "engine.precision=bf16"]))
    assert isinstance(run.engine, MegatronConfig)
    paths = [mistake.path for mistake in MegatronEngine.check_run(run.engine, run)]
    assert paths == ["experts.lora.rank", "engine.experts", "engine.dispatcher"]


def test_a_run_says_what_it_computes_and_sends_with() -> None:
    said = MegatronEngine(MegatronConfig(experts="megatron", dispatcher="allgather")).describe()
    assert said.startswith(
        "megatron: experts=megatron (Megatron's own experts), dispatcher=allgather (an all-"
    )

"""Adapters for other libraries: found, refused by name, and right in what they pass.

The libraries themselves, where they are installed: installed_third_party.py.
Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels.third_party
from kernels.backend import Workload
from kernels.expert_mlp import BACKENDS, BackendError, choose_backend
from kernels.plan.row_plan import RowPlan, sorted_route
from kernels.third_party import THIRD_PARTY
from kernels.third_party.adapter import Requirement, ThirdPartyLimitError
from kernels.third_party.deepgemm import DeepGEMM
from kernels.third_party.scattermoe import ScatterMoE
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.jobs.upcycle_job import UpcycleJob
from tests.kernels.expert_reference import (
    NAMES,
    Inputs,
    Sizes,
    assert_agrees,
    make_inputs,
    run_backend,
    run_reference,
    workload,
)
from tests.kernels.third_party_stand_ins import STAND_INS

CUDA = Workload(torch.device("cuda"), torch.bfloat16, 8, 128, 64, "silu", False)


def with_mask(inputs: Inputs) -> Inputs:
    """Every third slot unused, one token without any, and NaN in it."""
    T, K = inputs.ids_TK.shape
    mask_TK = (torch.arange(T)[:, None] + torch.arange(K)) % 3 > 0
    mask_TK[T // 2] = False
    # Nothing that stands in a token without experts may get anywhere.
    x_TD = inputs.tensors["x"].clone()
    x_TD[T // 2] = float("nan")
    return dataclasses.replace(inputs, mask_TK=mask_TK, tensors={**inputs.tensors, "x": x_TD})


CASES = {
    "standard": Sizes(),
    "odd": Sizes(T=11, K=3, E=7, D=7, F=5),
    "one slot": Sizes(K=1),
    "more experts than rows": Sizes(T=3, E=20),
    "no tokens": Sizes(T=0),
    "slots masked": Sizes(K=3),
    "ungated": Sizes(gated=False, activation="gelu"),
    "biases": Sizes(b_up=True, b_down=True),
    "biases, slots masked": Sizes(K=3, b_up=True, b_down=True),
    "both halves through relu": Sizes(activation="drelu"),
    "tanh form": Sizes(activation="gelu_pytorch_tanh"),
}


def fits(name: str, sizes: Sizes) -> bool:
    """Whether an adapter takes experts of this kind, whatever their widths and wherever they are."""
    backend = THIRD_PARTY[name]
    biased = sizes.b_up or sizes.b_down
    known = backend.activations is None or sizes.activation in backend.activations
    return (backend.ungated or sizes.gated) and (backend.biased or not biased) and known


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every library is there in the first version its adapter is for, on an H200."""
    versions = {
        r.distribution: ".".join(map(str, r.at_least))
        for backend in THIRD_PARTY.values()
        for r in backend.requirements
    }
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleType(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported from the libraries computes what their sources say, in plain torch."""
    for name, module in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[misc]
        monkeypatch.setitem(sys.modules, name.split(".")[0], STAND_INS.get(name.split(".")[0], module))


def test_adapters_are_found_by_being_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(THIRD_PARTY) == {"deepgemm", "grouped_gemm", "liger", "megablocks", "scattermoe", "sonicmoe"}
    assert all(BACKENDS[name] is backend and backend.name == name for name, backend in THIRD_PARTY.items())
    source = (Path(kernels.third_party.__file__).parent / "liger.py").read_text()
    (tmp_path / "tiger.py").write_text(source.replace('"liger"', '"tiger"'))
    monkeypatch.setattr(kernels.third_party, "__path__", [*kernels.third_party.__path__, str(tmp_path)])
    found = kernels.third_party._discover()
    monkeypatch.delitem(sys.modules, "kernels.third_party.tiger")
    assert set(found) == {*THIRD_PARTY, "tiger"}


@pytest.mark.parametrize("name", list(THIRD_PARTY))
def test_what_is_not_installed_says_so_and_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError) as caught:
        choose_backend(workload(Sizes(), torch.bfloat16), name)
    first = THIRD_PARTY[name].requirements[0]
    why = f"the package {first.distribution} is not installed ({first.install})"
    assert str(caught.value) == f"the back end {name!r} cannot run this: {why}"


def test_a_run_is_told_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {requirement.module for backend in THIRD_PARTY.values() for requirement in backend.requirements}
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else real(name))

    def told(backend: str) -> list[str]:
        config = parse_config(compose_config(["+recipe=upcycle", f"experts.backend={backend}"]))
        return [str(m) for m in UpcycleJob().check(config, 1) if m.path.startswith("experts")]

    assert told("auto") == told("cpu") == []
    assert told("liger") == [
        "experts.backend='liger': the package liger-kernel is not installed (pip install "
        "'liger-kernel>=0.8.1,<0.9'). Install it, or set experts.backend=auto."
    ]


@pytest.mark.parametrize("name", list(THIRD_PARTY))
def test_versions_that_nobody_read_are_refused(
    name: str, present: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = THIRD_PARTY[name]
    assert backend.unsupported_reason(CUDA) is None
    for requirement in backend.requirements:
        below = ".".join(map(str, requirement.below))
        for version in ("0.0.1", below, f"{below}.dev0", "main"):
            with monkeypatch.context() as patch:
                patch.setattr(importlib.metadata, "version", _only(requirement, version))
                why = backend.unsupported_reason(CUDA)
            range_ = requirement.versions
            assert (
                why == f"{requirement.distribution} {version} is installed, and the adapter is for {range_}"
            )
        # A source tree on the path is not installed: whose version is it?
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", _only(requirement, None))
            assert "no package" in str(backend.unsupported_reason(CUDA)) and "version" in str(
                backend.unsupported_reason(CUDA)
            )


def _only(requirement: Requirement, version: str | None):  # type: ignore[no-untyped-def]
    before = importlib.metadata.version

    def found(name: str) -> str:
        if name != requirement.distribution:
            return before(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    return found


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("liger", {"activation": "gelu"}, "it has no activation 'gelu'; it has silu, swish"),
        ("liger", {"gated": False}, "it runs gated experts only"),
        ("liger", {"has_bias": True}, "it takes no bias"),
        ("liger", {"dtype": torch.float64}, "it runs bfloat16, float16, float32, not torch.float64"),
        ("liger", {"dtype": torch.float32}, "its fp32 products are TF32, and torch.get_float32_matmul"),
        ("liger", {"device": torch.device("meta")}, "it runs on GPUs, and the weights are on meta"),
        ("scattermoe", {"device": torch.device("cpu")}, "on a CPU only with TRITON_INTERPRET=1"),
        ("scattermoe", {"low_rank": 4}, "it has no low-rank factors"),
        ("scattermoe", {"accumulates": True}, "it returns gradients and adds them to no buffer"),
        (
            "scattermoe",
            {"num_experts": 256, "model_width": 7168, "expert_width": 2048},
            "have 7516192768 ele",
        ),
        ("grouped_gemm", {"dtype": torch.float16}, "it runs bfloat16, not torch.float16"),
        ("grouped_gemm", {"device": torch.device("cpu")}, "it runs on GPUs, and the weights are on cpu"),
        ("megablocks", {"expert_width": 60}, "the expert width 60 is not a multiple of 8"),
        ("deepgemm", {"model_width": 96}, "the model width 96 is not a multiple of 64"),
        ("sonicmoe", {"activation": "gelu"}, "it has no activation 'gelu'; it has silu, swish, gelu_new"),
    ],
)
def test_workloads_are_refused_with_the_reason(
    name: str, change: dict[str, object], message: str, present: None
) -> None:
    assert THIRD_PARTY[name].unsupported_reason(CUDA) is None
    with pytest.raises(BackendError) as caught:
        choose_backend(dataclasses.replace(CUDA, **change), name)  # type: ignore[arg-type]
    assert f"the back end {name!r} cannot run this: " in str(caught.value) and message in str(caught.value)


def test_gpus_are_refused_by_capability(present: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, refused in [((7, 5), set(THIRD_PARTY)), ((8, 9), {"deepgemm", "sonicmoe"})]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, here=capability: here)
        assert {
            name for name, backend in THIRD_PARTY.items() if backend.unsupported_reason(CUDA) is not None
        } == refused
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert THIRD_PARTY["sonicmoe"].unsupported_reason(CUDA) == (
        "it has kernels for compute capability 9.x and 10.x, and this GPU has 12.0"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1 runs kernels on CPU" in str(THIRD_PARTY["liger"].unsupported_reason(CUDA))
    assert (
        THIRD_PARTY["liger"].unsupported_reason(dataclasses.replace(CUDA, device=torch.device("cpu"))) is None
    )


def test_a_forced_third_party_back_end_is_chosen_and_auto_takes_none(present: None) -> None:
    for name in THIRD_PARTY:
        assert choose_backend(CUDA, name).backend is THIRD_PARTY[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose_backend(dataclasses.replace(CUDA, dtype=dtype)).backend.name not in THIRD_PARTY


RUNS = [
    pytest.param(n, c, id=f"{n}-{c}") for n in THIRD_PARTY for c, sizes in CASES.items() if fits(n, sizes)
]


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_what_is_passed_to_a_library_gives_outputs_and_gradients(
    name: str, case: str, stand_ins: None
) -> None:
    """With stand-ins: layouts, indices, weights and gradients by name, not the libraries' kernels."""
    inputs = make_inputs(CASES[case])
    inputs = with_mask(inputs) if "masked" in case else inputs
    # DeepGEMM sums dW in fp32 buffers, and SonicMoE takes fp32 weights.
    dtype = torch.float32 if name in ("deepgemm", "sonicmoe") else torch.float64
    clean = {n: v.nan_to_num() for n, v in inputs.tensors.items()}
    reference = run_reference(dataclasses.replace(inputs, tensors=clean).to(dtype).to(torch.float64))
    assert_agrees(name, inputs.to(dtype), reference, NAMES)


@pytest.mark.parametrize("name", list(THIRD_PARTY))
@pytest.mark.parametrize("used", ["some", "none"])
def test_rows_that_pad_a_plan_reach_nothing(
    name: str, used: str, stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans for a GPU are padded where slots are masked: the host does not know how many are used."""

    def padded(ids_TK: Tensor, num_experts: int, mask_TK: Tensor) -> RowPlan:
        slot_R, token_R, row_TK, counts_E = sorted_route(ids_TK, mask_TK, num_experts, ids_TK.numel())
        return RowPlan(token_R, slot_R, row_TK, counts_E, has_unused=True, is_padded=True)

    monkeypatch.setattr("tests.kernels.expert_reference.make_plan", padded)
    inputs = with_mask(make_inputs(Sizes(K=3)))
    if used == "none":
        assert inputs.mask_TK is not None
        inputs = dataclasses.replace(inputs, mask_TK=torch.zeros_like(inputs.mask_TK))
    clean = dataclasses.replace(inputs, tensors={n: v.nan_to_num() for n, v in inputs.tensors.items()})
    reference = run_reference(clean.to(torch.float32).to(torch.float64))
    assert_agrees(name, inputs.to(torch.float32), reference, NAMES)


@pytest.mark.parametrize("name", list(THIRD_PARTY))
def test_frozen_weights_and_no_gradients_at_all(name: str, stand_ins: None) -> None:
    inputs = make_inputs(Sizes()).to(torch.float32)
    reference = run_reference(inputs.to(torch.float64))
    for wanted in (("x",), ("weights", "w_down"), ("w_up",), ()):
        assert_agrees(name, inputs, reference, wanted)
    with torch.inference_mode():
        assert_agrees(name, inputs, reference, ())


def test_rows_beyond_32_bits_are_refused_before_a_kernel_runs(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(Sizes()).to(torch.float32)
    monkeypatch.setattr("kernels.third_party.scattermoe._ADDRESSABLE", 26 * 24)
    with pytest.raises(ThirdPartyLimitError, match="addresses rows with 32 bits: 26 rows of 24 are too many"):
        run_backend("scattermoe", inputs, ())
    assert ScatterMoE().requirements[0].versions == ">=0.3,<0.4"


def test_padding_puts_every_expert_on_a_boundary() -> None:
    # 3, 0 and 5 rows, to multiples of 4: rows 0 to 2, padding, then rows 4 to 8 and three of padding.
    from kernels.third_party.deepgemm import _Padded

    padded = _Padded.of(torch.tensor([3, 0, 5]), 8, 4)
    assert padded.place_R.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert padded.expert_P.tolist() == [0, 0, 0, -1, 2, 2, 2, 2, 2, -1, -1, -1]
    assert padded.sizes == [4, 0, 8] == padded.sizes_E.tolist()
    assert DeepGEMM.multiple == 64

"""NaN or infinity in a dense checkpoint is said of that checkpoint, by tensor and file, whoever reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.errors import ModelError
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.configs.copies_config import CopyConfig
from recipes.models.hf.finite_weights import not_finite
from recipes.models.hf.hf_model import load_model
from recipes.upcycling.convert.conversion import convert
from recipes.upcycling.convert.conversion_plan import ConversionRequest, plan_conversion
from recipes.upcycling.convert.folder_check import compare_folders
from recipes.upcycling.convert.moe_plan import MoERequest, open_dense, plan_moe
from recipes.upcycling.sharded.sharded_models import dense_model, materialize, moe_model
from tests.conftest import MakeCheckpoint
from tests.grid import each

pytestmark = pytest.mark.usefixtures("one_thread")

_UP, _NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
_METHOD, _ROUTER = CopyConfig(num_experts=2), TopKConfig(top_k=2)


def _converts(dense: Path, out: Path) -> None:
    request = ConversionRequest(dense=dense, method=_METHOD, router=_ROUTER)
    convert(plan_conversion(request), out, lambda count: None)


def _shards(dense: Path, out: Path) -> None:
    materialize(moe_model(plan_moe(MoERequest(dense, _METHOD, _ROUTER))))


READERS: dict[str, Callable[[Path, Path], object]] = {
    "converter": _converts,
    "job, MoE": _shards,
    "job, dense": lambda dense, out: materialize(dense_model(open_dense(dense))),
    "calibration": lambda dense, out: load_model(dense),
    "verify": lambda dense, out: compare_folders(dense, dense, torch.ones(1, 4, dtype=torch.long)),
}


@each("reader", list(READERS))
@each(("name", "value", "what"), [(_UP, float("nan"), "NaN"), (_NORM, float("-inf"), "infinity")])
def test_a_weight_that_is_no_number_is_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, reader: str, name: str, value: float, what: str
) -> None:
    dense = Path(shutil.copytree(make_checkpoint("llama", dtype="bfloat16"), tmp_path / "dense"))
    weights = load_file(dense / "model.safetensors")
    weights[name].view(-1)[-3] = value
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"dense.*its tensor {name} holds {what}. Download") as caught:
        READERS[reader](dense, tmp_path / "out")
    assert "model.safetensors" in str(caught.value)
    assert not (tmp_path / "out").exists()


@each("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_element_is_seen_and_large_numbers_are_finite(dtype: torch.dtype) -> None:
    largest = torch.full((1001,), torch.finfo(dtype).max, dtype=dtype)
    assert not_finite(largest) is None and not_finite(-largest) is None
    for place in (0, 517, 1000):
        for value, what in ((float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")):
            changed = largest.clone()
            changed[place] = value
            assert not_finite(changed) == what
    assert not_finite(torch.empty(0, dtype=dtype)) is None
    assert not_finite(torch.arange(3)) is None

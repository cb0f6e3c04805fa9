"""Quantised checkpoints become plain ones: by hand, by a loop, and by transformers' own functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from moe.errors import ModelError
from recipes.models.hf.inspection import check_dense
from recipes.models.packed import packed_formats
from recipes.models.packed.dequantise import dequantise
from recipes.runtime.safetensors_codec import TensorSpec
from tests.conftest import MakeCheckpoint

_FP8 = {"quant_method": "fp8", "weight_block_size": [16, 8], "activation_scheme": "dynamic"}


def _fp8(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)


def _scales(shape: tuple[int, ...], rows: int, columns: int) -> Tensor:
    grid = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    return torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.1


def _unpack(tensors: dict[str, Tensor], method: str, **settings: Any) -> dict[str, Tensor]:
    specs = {name: TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    found = packed_formats()[method].unpacked(specs, settings)
    made = {plain.name: (plain, plain.unpack([tensors[part] for part in plain.parts])) for plain in found}
    assert all(plain.shape == tuple(tensor.shape) for plain, tensor in made.values())
    return {name: tensor for name, (_, tensor) in made.items()}


@pytest.mark.parametrize("shape", [(10, 7), (8, 6), (2, 10, 7), (1, 1)])
def test_each_element_has_the_scale_of_its_block(shape: tuple[int, ...]) -> None:
    weight, scales = _fp8(shape), _scales(shape, 4, 3)
    tensors = {"w": weight, "w_scale_inv": scales}
    (found,) = _unpack(tensors, "fp8", weight_block_size=[4, 3]).values()
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)).tolist():
        *stack, i, j = place
        block = scales[(*stack, i // 4, j // 3)]
        assert float(found[tuple(place)]) == float(weight[tuple(place)].float() * block)


@pytest.mark.parametrize("kind", ["float32", "bytes", "e8m0"])
def test_fp8_is_what_transformers_makes_of_it(kind: str) -> None:
    weight = _fp8((32, 24))
    exponents = torch.randint(100, 140, (2, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    scales = {
        "float32": _scales((32, 24), 16, 8),
        "bytes": exponents,
        "e8m0": exponents.view(torch.float8_e8m0fnu),
    }[kind]
    (found,) = _unpack({"w": weight, "w_scale_inv": scales}, "fp8", weight_block_size=[16, 8]).values()
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.float32)
    assert torch.equal(found, theirs)


def test_a_tensor_may_have_one_scale() -> None:
    weight = _fp8((3, 5))
    (found,) = _unpack({"w": weight, "w_scale_inv": torch.tensor(0.5)}, "fp8").values()
    assert torch.equal(found, weight.float() / 2)


def test_four_bits_by_hand() -> None:
    # One expert, one row: bytes 0x21, 0xF8, then zeros; the exponent is 128 - 127 = 1.
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[..., :2] = torch.tensor([0x21, 0xF8], dtype=torch.uint8)
    scales = torch.full((1, 1, 1), 128, dtype=torch.uint8)
    (found,) = _unpack({"e_blocks": blocks, "e_scales": scales}, "mxfp4").values()
    assert found.shape == (1, 32, 1)
    assert found[0, :5, 0].tolist() == [1.0, 2.0, -0.0, -12.0, 0.0]


def test_four_bits_are_what_transformers_makes_of_them() -> None:
    draw = torch.Generator().manual_seed(3)
    blocks = torch.randint(256, (2, 6, 3, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(100, 150, (2, 6, 3), generator=draw, dtype=torch.uint8)
    (found,) = _unpack({"e_blocks": blocks, "e_scales": scales}, "mxfp4").values()
    assert torch.equal(found, _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    assert torch.equal(found.bfloat16(), _convert_moe_packed_tensors(blocks, scales))


@pytest.fixture
def quantised(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> tuple[Path, dict[str, Tensor]]:
    """An FP8 checkpoint of a Llama in bf16, and its plain weights."""
    folder = tmp_path / "fp8"
    shutil.copytree(make_checkpoint("llama", dtype="bfloat16"), folder)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".mlp." not in name and "_proj" not in name:
            stored[name] = plain[name] = tensor
            continue
        packed, scales = tensor.float().to(torch.float8_e4m3fn), _scales(tuple(tensor.shape), 16, 8)
        stored |= {
            name: packed,
            f"{name}_scale_inv": scales,
            name.replace("weight", "input_scale"): scales[0, 0].clone(),
        }
        spread = scales.repeat_interleave(16, 0).repeat_interleave(8, 1)
        plain[name] = (packed.float() * spread[: tensor.shape[0], : tensor.shape[1]]).bfloat16()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": _FP8}))
    return folder, plain


def test_a_checkpoint_becomes_a_plain_one(quantised: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, plain = quantised
    (mistake,) = check_dense(str(folder))
    assert f"graft dequantize {folder}" in mistake.remedy
    found = dequantise(folder, tmp_path / "out")
    assert (found.packed, found.copied, found.left_out) == (21, 9, 21) and found.dtype == torch.bfloat16
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert check_dense(str(tmp_path / "out")) == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.items())
    whole = dequantise(folder, tmp_path / "fp32", torch.float32)
    exact = load_file(tmp_path / "fp32" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert whole.dtype == exact.dtype == torch.float32
    assert torch.equal(exact.bfloat16(), plain["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (None, "it is not quantised"),
        ({"quant_method": "gptq"}, "quantised by gptq, which is not known here"),
        ({"quant_method": "mxfp4"}, "says mxfp4, and its files hold no such weights"),
        (_FP8 | {"weight_block_size": [8, 8]}, r"in blocks of 8 x 8, and its scales are \[\d, \d\], not"),
        (_FP8 | {"weight_block_size": "128"}, "is no pair of sizes"),
        (_FP8 | {"weight_block_size": None}, "no weight_block_size says how it goes"),
    ],
)
def test_what_does_not_fit_is_refused(
    quantised: tuple[Path, dict[str, Tensor]], tmp_path: Path, settings: Any, rule: str
) -> None:
    folder, _ = quantised
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ModelError, match=rule):
        dequantise(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fp8_without_scales_is_refused(quantised: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = quantised
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight is FP8 and has no"):
        dequantise(folder, tmp_path / "out")


def test_scales_of_something_else_are_refused(
    quantised: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, _ = quantised
    stored = load_file(folder / "model.safetensors")
    # Plain by its dtype: to copy it would lose the scale.
    stored["model.layers.1.mlp.up_proj.weight"] = stored["model.layers.1.mlp.up_proj.weight"].bfloat16()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight_scale_inv is of weights that are not in fp8"):
        dequantise(folder, tmp_path / "out")

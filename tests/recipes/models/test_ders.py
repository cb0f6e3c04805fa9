"""Base and deltas: what each codec holds by hand, and checkpoints there and back."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tools.ders
from moe.errors import ConfigError, ModelError
from moe.experts.deltas import DeltaCodec, QuantisedDelta, SparseDelta
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.configs.copies_config import CopyConfig
from recipes.models.ders.delta_store import CONFIG, compress, expand
from recipes.models.hf.weight_files import weight_files
from recipes.upcycling.convert.conversion import convert
from recipes.upcycling.convert.conversion_plan import ConversionRequest, plan_conversion
from recipes.upcycling.convert.folder_check import compare_folders
from tests.conftest import VOCABULARY, MakeCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")
CODECS: list[DeltaCodec] = [
    SparseDelta(),
    SparseDelta(one_of=3, rescale=True, seed=1),
    SparseDelta(one_of=1),
    *(QuantisedDelta(bits) for bits in (1, 2, 4, 8)),
]


def mixture(dense: Path, out: Path, noise: float = 0.0, experts: int = 4, **more: Any) -> Path:
    """A Mixtral of copies, parted by noise."""
    method = CopyConfig(num_experts=experts, noise_std=noise)
    plan = plan_conversion(ConversionRequest(dense, method, TopKConfig(top_k=2), **more))
    return convert(plan, out).path


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Everything in a folder's files."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(4, 10), (3, 7), (1, 1), (2, 3, 5)])
def test_what_is_encoded_has_the_declared_form(codec: DeltaCodec, shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = codec.encode(delta, "w 1")
    declared = codec.parts(shape, torch.float32)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in parts.items()} == declared
    assert codec.decode(parts, shape, "w 1").shape == delta.shape
    zero = codec.encode(torch.zeros(shape), "w 1")
    assert not codec.decode(zero, shape, "w 1").any()


def test_sparse_keeps_one_of_each_block() -> None:
    codec = SparseDelta(one_of=4)
    delta = torch.arange(1.0, 11.0).view(2, 5)
    kept = codec.decode(codec.encode(delta, "w"), (2, 5), "w").flatten()
    for start in (0, 4, 8):
        block = kept[start : start + 4]
        (place,) = block.nonzero().flatten().tolist()
        assert block[place] == start + place + 1
    # Another matrix keeps others, and in the mean over matrices every element as often.
    places = torch.stack(
        [SparseDelta(5).decode({"values": torch.ones(40)}, (200,), str(i)) for i in range(500)]
    )
    assert (places.mean(0) - 0.2).abs().max() < 0.08
    scaled = SparseDelta(one_of=4, rescale=True)
    assert torch.equal(scaled.decode(scaled.encode(delta, "w"), (2, 5), "w").flatten(), 4 * kept)


def test_two_bits_by_hand() -> None:
    """A row of rms 2: steps of 1.9914, levels at +-0.5 and +-1.5 of it."""
    delta = torch.tensor([[2.0, -2.0, 2.0, -2.0, 2.0]])
    codec = QuantisedDelta(2)
    parts = codec.encode(delta, "w")
    torch.testing.assert_close(parts["step"], torch.tensor([[2 * 0.9957]]))
    # 2 / 1.9914 is in the second level above 0: code 3; -2 in the second below: code 0. Low bits first.
    assert parts["packed"].tolist() == [[0b00110011, 0b00000011]]
    decoded = codec.decode(parts, (1, 5), "w")
    torch.testing.assert_close(decoded, torch.tensor([[1.5, -1.5, 1.5, -1.5, 1.5]]) * 2 * 0.9957)


@pytest.mark.parametrize(("bits", "loss"), [(1, 0.3634), (2, 0.1188), (4, 0.01154), (8, 8.769e-5)])
def test_gaussian_differences_lose_what_is_least(bits: int, loss: float) -> None:
    """Squared error of the best uniform quantisers of a Gaussian; to 4 bits as in Max 1960."""
    delta = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    codec = QuantisedDelta(bits)
    wrong = (codec.decode(codec.encode(delta, "w"), (64, 4096), "w") - delta).square().mean()
    assert wrong == pytest.approx(loss, rel=0.05)


@pytest.mark.parametrize("codec", CODECS[:4], ids=str)
@pytest.mark.parametrize("experts", [3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_come_back_bit_for_bit(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, codec: DeltaCodec, experts: int, dtype: str
) -> None:
    moe = mixture(make_checkpoint("llama", dtype=dtype), tmp_path / "moe", experts=experts)
    found = compress(moe, tmp_path / "small", codec)
    assert found.relative_error == 0 and found.delta_share == 0
    assert codec == SparseDelta(one_of=1) or found.stored_bytes < found.source_bytes
    assert expand(tmp_path / "small", tmp_path / "again") == found.source_bytes
    first, second = tensors_of(moe), tensors_of(tmp_path / "again")
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((moe / "config.json").read_text()) == json.loads(
        (tmp_path / "again" / "config.json").read_text()
    )
    assert not (tmp_path / "small" / "config.json").exists() and (tmp_path / "small" / CONFIG).is_file()


@pytest.mark.parametrize(("family", "form"), [("llama", {}), ("qwen3", {"layout": "fused"})])
def test_trained_experts_lose_what_is_said(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str, form: Any
) -> None:
    dense = make_checkpoint(family)
    moe = mixture(dense, tmp_path / "moe", noise=0.1, **form)
    found = compress(moe, tmp_path / "small", QuantisedDelta(2))
    expand(tmp_path / "small", tmp_path / "again")
    first, second = tensors_of(moe), tensors_of(tmp_path / "again")
    experts = [name for name in first if ".experts." in name]
    wrong = sum(float((first[name] - second[name]).double().square().sum()) for name in experts)
    whole = sum(float(first[name].double().square().sum()) for name in experts)
    assert found.relative_error == pytest.approx((wrong / whole) ** 0.5, rel=1e-6)
    assert 0 < found.relative_error < found.delta_share
    assert all(torch.equal(first[name], second[name]) for name in first if name not in experts)
    tokens = torch.randint(1, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
    assert compare_folders(moe, tmp_path / "again", tokens).logits.relative < 0.2


def test_the_command_and_its_mistakes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        return tools.ders.main()

    moe = mixture(make_checkpoint("llama"), tmp_path / "moe", noise=0.1)
    assert call("compress", moe, tmp_path / "small", "--bits", 4, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["groups"] == 9  # three layers of three matrices
    assert call("expand", tmp_path / "small", tmp_path / "again") == 0
    with pytest.raises(ConfigError) as caught:
        call("compress", tmp_path / "none", tmp_path / "again", "--bits", 3, "--rescale")
    assert len(caught.value.mistakes) == 4
    with pytest.raises(ModelError, match="no experts"):
        call("compress", make_checkpoint("llama"), tmp_path / "other")
    with pytest.raises(ModelError, match="ders.json"):
        call("expand", moe, tmp_path / "other")


@pytest.mark.parametrize("ending", [".base", ".2.values", "norm.weight"])
def test_a_tensor_that_is_gone_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path, ending: str) -> None:
    moe = mixture(make_checkpoint("llama"), tmp_path / "moe")
    compress(moe, tmp_path / "small", SparseDelta())
    (path,) = weight_files(tmp_path / "small")
    tensors = load_file(path)
    lost = min(name for name in tensors if name.endswith(ending))
    save_file({name: value for name, value in tensors.items() if name != lost}, path)
    with pytest.raises(ModelError, match=re.escape(f"1 tensors are missing from its files, {lost}")):
        expand(tmp_path / "small", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe", "small"]

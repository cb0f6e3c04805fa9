"""An export is read back without ever being whole, and what is not in it as it was written is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.errors import ModelError
from recipes.config.sections.export_config import ExportConfig
from recipes.models.export import choose_exporter
from recipes.models.export.read_back import ReadBack
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import export
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.hf_model import HFModel
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.safetensors_codec import TensorSpec
from recipes.studies.benchmarks.live_bytes import peak_bytes
from tests.conftest import MakeCheckpoint
from tests.recipes.models.test_exporters import some_tokens, trained_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
Tensors = Iterator[tuple[str, Tensor]]


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma3_text", True)])
@torch.no_grad()
def test_one_block_at_a_time_is_in_memory(
    family: str,
    tied: bool,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Storages are counted by thread; in bf16 all that is read is made anew, and so counted.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    layers, wide = 6, {"intermediate_size": 512}
    model = trained_model(make_checkpoint(family, tied=tied, num_hidden_layers=layers, **wide))
    exporter, _ = choose_exporter(describe_model(model))
    assert exporter.is_native != tied
    export(model, exporter, model.module.state_dict().items(), tmp_path / "hf", torch.bfloat16, writes=True)
    block = sum(p.nbytes for p in decoder_blocks(model.module, model.config)[0].parameters())
    whole = sum(p.nbytes for p in model.module.parameters())
    tokens = some_tokens()[:1, :4]
    found = {}

    def compute(memory_bytes: float) -> None:
        module = ReadBack(exporter.open(tmp_path / "hf"), memory_bytes).model
        found[memory_bytes] = module(input_ids=tokens).logits

    at_once = peak_bytes(lambda: compute(whole), [tokens], CPU)
    streamed = peak_bytes(lambda: compute(whole - 1), [tokens], CPU)
    outside = whole - layers * block
    assert at_once > whole > 6 * block
    # A block, and its tensors a second time: as they are in the file, and one that is put together.
    assert streamed < outside + 3 * block
    assert torch.equal(found[whole], found[whole - 1])


def test_less_than_no_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_gib=-1: must be at least 0"):
        ExportConfig(memory_gib=-1)


def without(model: HFModel, part: str) -> Tensors:
    return (item for item in model.module.state_dict().items() if part not in item[0])


def twice(model: HFModel, part: str) -> Tensors:
    state = model.module.state_dict().items()
    yield from state
    yield from ((name, tensor) for name, tensor in state if part in name)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (without, r"layers\.1\.\S*experts\.0\.\S*weight: 1536 of its elements were not written, and 0 twice"),
        (twice, r"layers\.1\.\S*experts\.0\.\S*weight: 0 of its elements were not written, and 1536 twice"),
    ],
)
def test_a_missing_or_doubled_expert_is_named(
    given: Callable[[HFModel, str], Tensors],
    text: str,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    model = trained_model(make_checkpoint("llama"))
    exporter, _ = choose_exporter(describe_model(model))
    with pytest.raises(ModelError, match=text):
        export(
            model, exporter, given(model, "layers.1.mlp.experts"), tmp_path / "hf", torch.float32, writes=True
        )
    assert not (tmp_path / "hf").exists()


def test_bytes_that_change_behind_their_writing_are_found(tmp_path: Path) -> None:
    files = TensorFiles(tmp_path, [TensorSpec(name, torch.bfloat16, (2, 3)) for name in "ab"])
    for name in "ab":
        files.write(name, torch.ones(3), offset=3)
        files.write(name, torch.ones(3))
    assert list(files.problems()) == [None, None]
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert list(files.problems()) == [None, "b: its bytes in the file are not those that were written"]
    with pytest.raises(ModelError, match="b: its bytes in the file"):
        files.finish()


def test_a_tensor_that_the_files_lack_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = trained_model(make_checkpoint("llama"))
    exporter, _ = choose_exporter(describe_model(model))
    export(model, exporter, model.module.state_dict().items(), tmp_path / "hf", torch.float32, writes=True)
    path = tmp_path / "hf" / "model.safetensors"
    held = load_file(path)
    gone = next(name for name in held if "layers.1" in name and name.endswith("gate.weight"))
    save_file({name: tensor for name, tensor in held.items() if name != gone}, path, {"format": "pt"})
    module = ReadBack(exporter.open(tmp_path / "hf"), memory_bytes=0).model
    with pytest.raises(ModelError, match=r"no file holds model\.layers\.1\.mlp\.gate\.weight"):
        module(input_ids=some_tokens())

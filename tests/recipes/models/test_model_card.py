"""The card of an export says what the model is, and in which programs it is exact."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.fsdp import FSDPModule

from moe.routers.configs.topk_config import TopKConfig
from recipes.models.export import choose_exporter
from recipes.models.export.model_card import CARD, Origin, dense_name, replace_certificates, write_card
from recipes.models.export.spec import describe_model
from tests.conftest import MakeCheckpoint
from tests.recipes.models.test_native_formats import moe_in

ORIGIN = Origin("small-1", "copy", "trained to step 7 since")


def card(
    make_checkpoint: MakeCheckpoint, folder: Path, family: str, router: TopKConfig, **options: object
) -> str:
    """Writes the card of a model and returns it."""
    model = moe_in(make_checkpoint(family, **options), "last:2", router, 0)
    exporter, _ = choose_exporter(describe_model(model))
    write_card(folder, exporter, describe_model(model), ORIGIN)
    return (folder / CARD).read_text()


def test_a_native_export(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    text = card(make_checkpoint, tmp_path, "qwen3", TopKConfig(top_k=2))
    assert "the dense model small-1 (Qwen3ForCausalLM) by the method `copy`; it was trained to step 7" in text
    assert "2 of its 3 layers have 4 experts 48 wide, of which a token uses 2; the router is `topk`." in text
    # llama.cpp's class has no dense layers.
    assert "was trained: transformers, vllm." in text and "vllm serve FOLDER" in text and "gguf" not in text


def test_a_format_that_graft_alone_reads(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    text = card(make_checkpoint, tmp_path, "gemma2", TopKConfig(top_k=2))
    assert "was trained: graft." in text and "load_graft" in text and "vllm serve" not in text


def test_names_are_those_that_people_know(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert dense_name("/models/SmolLM2") == "SmolLM2" and dense_name("/outputs/run-1/hf") == "run-1"
    assert dense_name(None) == "Graft's default model"
    model = moe_in(make_checkpoint("qwen3"), "all", TopKConfig(top_k=2), 0)
    # As FSDP2 does it.
    model.module.__class__ = type("FSDPQwen3ForCausalLM", (FSDPModule, type(model.module)), {})
    assert describe_model(model).architecture == "Qwen3ForCausalLM"


def test_certificates_take_their_section(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    before = card(make_checkpoint, tmp_path, "qwen3", TopKConfig(top_k=2)).partition("## Certificates")[0]
    for text in ("| vllm |", "| transformers |"):
        replace_certificates(tmp_path, text)
        assert (tmp_path / CARD).read_text() == f"{before}## Certificates\n\n{text}\n"
    (tmp_path / CARD).write_text("another's")
    replace_certificates(tmp_path, "| vllm |")
    assert (tmp_path / CARD).read_text() == "another's"
    replace_certificates(tmp_path / "none", "| vllm |")

"""What a folder of other people's making is taken for: transformers' own loading is the judge."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from moe.errors import ModelError
from recipes.models.export.companions import check_companions, copy_companions
from recipes.models.hf.config_file import code_keys, load_config, with_floats
from recipes.models.hf.declared_config import DeclaredConfig
from recipes.models.hf.ffn_names import read_names, require_runs
from recipes.models.hf.header_shape import read_ffn_shape
from recipes.models.hf.inspection import check_dense
from recipes.models.hf.shape_from_module import shape_from_module
from recipes.runtime import machine_memory
from recipes.upcycling.convert.folder_check import load_any
from recipes.upcycling.convert.moe_plan import open_dense
from tests.conftest import MakeCheckpoint
from tests.grid import each

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def dense(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file."""
    return shutil.copytree(make_checkpoint("llama"), tmp_path / "dense")


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def others(folder: Path) -> dict[str, torch.Tensor]:
    """Weights that are not the folder's."""
    return {name: value + 1 for name, value in load_file(folder / SINGLE).items()}


def second_model(folder: Path) -> None:
    save_file(others(folder), folder / "model_1.safetensors", {"format": "pt"})


def average_beside(folder: Path) -> None:
    save_file(others(folder), folder / "ema.safetensors", {"format": "pt"})


def consolidated(folder: Path) -> None:
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")


def stale_index(folder: Path) -> None:
    save_file(others(folder), folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    names = dict.fromkeys(others(folder), "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def other_file_named(folder: Path) -> None:
    save_file(others(folder), folder / "mine.safetensors", {"format": "pt"})
    edit(folder, transformers_weights="mine.safetensors")


def own_head(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)


def same_head(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    save_file(weights | {HEAD: weights[EMBEDDINGS].clone()}, folder / SINGLE, {"format": "pt"})
    edit(folder, tie_word_embeddings=True)


def head_alone(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    del weights[EMBEDDINGS]
    save_file(weights, folder / SINGLE, {"format": "pt"})
    edit(folder, tie_word_embeddings=True)


RIGHT = [second_model, average_beside, consolidated, stale_index, other_file_named, own_head, same_head]


@each("change", [*RIGHT, head_alone])
def test_the_weights_are_those_that_transformers_loads(
    change: Callable[[Path], None], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense = shutil.copytree(make_checkpoint("llama"), tmp_path / change.__name__)
    change(dense)
    assert check_dense(str(dense)) == []
    judge = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model = open_dense(dense)
    judged = dict(judge.named_parameters(remove_duplicate=False))
    # Tied as transformers ties: the same names are one tensor.
    tied = {name for name, value in judged.items() if name == HEAD and value is judged[EMBEDDINGS]}
    assert set(model.names.tied) == tied
    assert set(model.names.state) | tied == set(judged)
    for name in model.names.state:
        assert torch.equal(model.files[0].read(model.stored[0][name]).float(), judged[name]), name


def packed(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name.replace(".weight", ".qweight")] = torch.ones(4, 4, dtype=torch.int32)
    save_file(weights, folder / SINGLE)


def whole_numbers(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / SINGLE)


def two_of_a_name(folder: Path) -> None:
    stale_index(folder)
    (folder / SINGLE).rename(folder / "more.safetensors")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"][HEAD] = "more.safetensors"
    (folder / INDEX).write_text(json.dumps(content))


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    change.__name__ = f"pipe_for_{name}"
    return change


def config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder, **values)

    change.__name__ = "-".join(values)
    return change


def renamed(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "weights.safetensors")


def blocks(folder: Path) -> None:
    held = load_file(folder / SINGLE)
    held["model.layers.0.mlp.down_proj.weight_blocks"] = torch.zeros(2, dtype=torch.uint8)
    save_file(held, folder / SINGLE, metadata={"format": "pt"})


def broken_link(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("nowhere")


_HUB = "kernels-community/flash-attn"
REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (packed, "its weights are quantised (its files hold model.layers.0.self_attn.q_proj.qweight)"),
    (whole_numbers, "q_proj.weight is int8 in its files: it is quantised"),
    (two_of_a_name, "model-00001-of-00001.safetensors and more.safetensors both hold"),
    (blocks, "its weights are quantised (its files hold model.layers.0.mlp.down_proj.weight_blocks)"),
    (renamed, "transformers does not look for weights.safetensors. Rename the file"),
    (broken_link, "model.safetensors is a link to nothing"),
    (pipe("config.json"), "its config.json is no regular file"),
    (pipe(SINGLE), "model.safetensors is no regular file"),
    (config(quantization_config={"quant_method": "gptq"}), "has a quantization_config"),
    (config(pad_token_id=300), "pad_token_id=300, beyond vocab_size=300. Set pad_token_id"),
    (config(num_hidden_layers=10**9), "num_hidden_layers=1000000000, which no model has"),
    (config(hidden_size="many"), "hidden_size='many', which is no whole number"),
    (config(text_config=[1]), "text_config=[1], which is no object"),
    (config(architectures=5), "architectures=5, which is no list"),
    (config(rms_norm_eps="small"), "transformers cannot use its config.json"),
    (config(model_type="frobnicate"), "transformers cannot use its config.json"),
    (config(transformers_weights="../x.safetensors"), "which is not a plain file name"),
    (config(attn_implementation=_HUB), "asks for code of a hub (attn_implementation="),
    (config(vision={"_attn_implementation": {"": _HUB}}), "asks for code of a hub (vision._attn_impl"),
]


@each("change, expected", REFUSED, ids=[change.__name__ for change, _ in REFUSED for _ in (0,)])
def test_other_folders_are_refused_in_a_sentence(
    change: Callable[[Path], None], expected: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense = shutil.copytree(make_checkpoint("llama"), tmp_path / change.__name__.replace("/", "-"))
    change(dense)
    mistakes = check_dense(str(dense))
    if not mistakes:
        with pytest.raises(ModelError) as caught:
            open_dense(dense)
        mistakes = list(caught.value.mistakes)
    assert any(expected in str(mistake) for mistake in mistakes), mistakes


@each(
    "model_type, values",
    [
        ("llama", {"return_dict": False}),
        # It builds, and its blocks have no window to attend within.
        ("qwen2", {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}),
    ],
)
def test_configs_that_build_and_do_not_run_are_refused(
    model_type: str, values: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense = shutil.copytree(make_checkpoint(model_type), tmp_path / "d")
    require_runs(dense)
    edit(dense, **values)
    with pytest.raises(ModelError, match="transformers cannot run it"):
        require_runs(dense)


def test_an_activation_that_the_class_does_not_read_is_none(dense: Path) -> None:
    edit(dense, hidden_activation="gelu")
    assert read_names(dense).ffns[0].shape.activation == "silu"
    shape = read_ffn_shape(dense)
    assert shape is not None and shape.activation == ""


def test_models_are_not_imported_where_a_limit_leaves_no_room(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An OpenBLAS that they bring asks for memory without end.
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils", raising=False)
    monkeypatch.setattr(machine_memory, "address_space_left", lambda: 2**20)
    with pytest.raises(machine_memory.LimitError, match=r"448 MiB, and the limit .* leaves 1 MiB"):
        read_names(dense)


def test_nothing_is_fetched_that_nobody_trusts(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.hub_kernels as hub

    asked: list[Any] = []
    monkeypatch.setattr(hub, "load_and_register_attn_kernel", lambda *args, **more: asked.append(args))
    edit(dense, _attn_implementation="flash_attention_2", auto_map={"AutoConfig": "mine.Config"})
    found = load_config(dense)
    assert found._attn_implementation is None and not hasattr(found, "auto_map")
    # A family that transformers has needs no code, and no trust; with trust alone it changes nothing.
    assert check_dense(str(dense)) == []
    for trust in (False, True):
        open_dense(dense, trust_remote_code=trust)
    # Whoever judges or measures a folder loads it without that code, too.
    assert load_any(dense).config._attn_implementation in ("sdpa", "eager")
    assert not asked
    assert code_keys({"a": [{"use_kernels": "x/y"}], "name": "x/y"}) == ["a.use_kernels=x/y"]


def test_keys_count_as_the_class_reads_them() -> None:
    llama = DeclaredConfig(LlamaConfig(sliding_window=8))
    assert not hasattr(llama, "sliding_window") and llama.num_hidden_layers == 32
    # Qwen2's config declares no head_dim, and its attention takes it all the same.
    assert DeclaredConfig(Qwen2Config(head_dim=48)).head_dim == 48
    assert DeclaredConfig(GPT2Config(n_layer=3)).num_hidden_layers == 3


def test_links_out_of_a_folder_are_not_followed(dense: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush")
    (dense / "tokenizer_notes.txt").symlink_to(secret)
    (mistake,) = check_companions(str(dense))
    assert "tokenizer_notes.txt is a link out of the folder" in mistake.rule
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match="link out of the folder"):
        copy_companions(dense, out)
    (dense / "tokenizer_notes.txt").unlink()
    # A link inside, and a snapshot of the hub's cache, whose files are links to its blobs.
    (dense / "vocab.txt").symlink_to("config.json")
    assert check_companions(str(dense)) == []
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "f00").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/f00")
    assert check_companions(str(snapshot)) == []
    copy_companions(snapshot, out)
    assert (out / "tokenizer.json").read_text() == "{}"


@each(
    ("family", "options"),
    [
        ("jamba", {"num_experts": 1, "attn_layer_period": 1, "attn_layer_offset": 0}),
        ("recurrent_gemma", {"lru_width": 32}),
    ],
)
def test_kinds_of_layers_that_a_config_computes(tmp_path: Path, family: str, options: Any) -> None:
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1}
    options = options | sizes | {"intermediate_size": 48, "vocab_size": 64}
    AutoConfig.for_model(family, **options).save_pretrained(tmp_path)
    assert [ffn.layer for ffn in read_names(tmp_path).ffns] == [0, 1, 2]


def test_floats_that_json_has_no_word_for() -> None:
    assert with_floats({"a": [{"__float__": "-Infinity"}, 1], "b": {"__float__": "x"}}) == {
        "a": [-math.inf, 1],
        "b": {"__float__": "x"},
    }
    # As transformers writes them: Nemotron-H has a limit of infinity.
    config = AutoConfig.for_model("nemotron_h", hidden_size=64, vocab_size=64)
    assert "__float__" in config.to_json_string()
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config).num_parameters()
    assert shape_from_module(json.loads(config.to_json_string())).count.total == theirs

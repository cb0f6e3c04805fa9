"""What is exported is what was trained: reloaded as its users would, it has the same logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipes.models.export.write_export as export_module
from moe.dispatch.local import LocalDispatcher
from moe.errors import ExactnessError, ModelError
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.topk import TopKRouter
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.copies import Copy
from moe.upcycle.dense_shape import Matrix
from recipes.models.export import choose_exporter
from recipes.models.export.graft_format import load_graft
from recipes.models.export.mixtral import MixtralExporter
from recipes.models.export.spec import MoESpec, describe_model
from recipes.models.export.write_export import export, verify_export
from recipes.models.hf.hf_model import HFModel, load_model
from recipes.models.hf.weight_files import INDEX_NAME, weight_files
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.safetensors_codec import TensorSpec
from tests.conftest import VOCABULARY, MakeCheckpoint
from tests.recipes.models.whole_surgery import Surgery, swap

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 7000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# All of them with settings that Mixtral's defaults are not; sequences are longer than the window.
MIXTRAL_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "rope theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "tied": ("llama", {"tied": True}),
    "head dim": ("llama", {"head_dim": 16}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "eps": ("llama", {"rms_norm_eps": 0.1}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "window": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "all": ("mistral", {"sliding_window": 5, "tied": True, "rope_parameters": LLAMA3_ROPE, "sharded": True}),
}
Exported = tuple[HFModel, Path]


def some_tokens() -> Tensor:
    """``[2, 40]``."""
    return torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


def trained_model(
    folder: Path, layers: str = "all", *, trust_remote_code: bool = False, **router: Any
) -> HFModel:
    """A mixture whose experts and routers have become different, as training makes them."""
    model = load_model(folder, trust_remote_code=trust_remote_code)
    config = TopKConfig(**{"top_k": 2} | router)
    surgery = Surgery(
        method=Copy(CopyConfig(num_experts=4, noise_std=0.5, layers=layers)),
        make_router=lambda width, experts: TopKRouter(config, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=3,
    )
    swap(model, surgery)
    with torch.no_grad():
        for _, layer in model.moe_layers():
            layer.router.weight_ED.mul_(20)  # decided routing: gates far from uniform
    model.module.eval()
    return model


def write(model: HFModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Exports as the job does, and in fp32 reads back as it does where the model is too large to be whole."""
    exporter, _ = choose_exporter(describe_model(model))
    export(model, exporter, model.module.state_dict().items(), folder, dtype, writes=True)
    if dtype == torch.float32:
        with torch.no_grad():
            logits = model.module(input_ids=some_tokens()).logits
        assert verify_export(exporter, folder, some_tokens(), logits, 0).sample is None
    return folder


@torch.no_grad()
def assert_same_logits(module: Any, model: HFModel) -> None:
    """1e-4 of the largest logit, the bound of every fp32 comparison here."""
    module.eval()
    ours = model.module(input_ids=some_tokens()).logits
    theirs = module(input_ids=some_tokens()).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4 * float(ours.abs().max()), rtol=0)


@torch.no_grad()
def round_parameters(model: HFModel, kept: str = " ") -> None:
    """To bf16, but for names that hold ``kept``; buffers such as rotary frequencies are in no file."""
    for name, parameter in model.module.named_parameters():
        if kept not in name:
            parameter.copy_(parameter.bfloat16())


def reload(folder: Path) -> Any:
    """By plain transformers, which must find every weight in its place."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return model


def names_in(folder: Path) -> set[str]:
    """Every tensor in a folder's files."""
    found: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("case", MIXTRAL_MODELS)
def test_llama_and_mistral_become_mixtral(make_checkpoint: MakeCheckpoint, tmp_path: Path, case: str) -> None:
    family, options = MIXTRAL_MODELS[case]
    dense = make_checkpoint(family, **options)
    model = trained_model(dense)
    exporter, unsupported_reasons = choose_exporter(describe_model(model))
    assert (exporter.name, unsupported_reasons) == ("mixtral", [])
    folder = write(model, tmp_path / "hf")
    module = reload(folder)
    assert type(module).__name__ == "MixtralForCausalLM"
    assert_same_logits(module, model)

    prompt = some_tokens()[:1, :8]
    generated = module.generate(
        prompt, max_new_tokens=4, do_sample=False, attention_mask=prompt.new_ones(1, 8)
    )
    assert generated.shape[0] == 1
    assert 8 < generated.shape[1] <= 12
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (dense, folder)]
    ids, same = (tokenizer("the quick fox")["input_ids"] for tokenizer in tokenizers)
    assert ids == same

    # What readers before transformers 5 look at.
    config = json.loads((folder / "config.json").read_text())
    rope = options.get("rope_parameters", {})
    assert config["rope_theta"] == rope.get("rope_theta", 10000.0)
    scaling = {key: rope[key] for key in rope if key != "rope_theta"}
    assert config.get("rope_scaling") == (scaling if rope.get("rope_type") == "llama3" else None)
    assert config["dtype"] == "float32"
    names = names_in(folder)
    assert ("lm_head.weight" in names) == (not options.get("tied", False))
    assert "model.layers.2.block_sparse_moe.experts.3.w2.weight" in names
    assert not any(".mlp." in name for name in names)


def test_experts_lie_where_mixtral_looks(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    # By hand for one expert: w1 is the gate, w3 the up, w2 the down projection.
    model = trained_model(make_checkpoint("llama"))
    tensors = load_file(write(model, tmp_path / "hf") / "model.safetensors")
    experts = model.moe_layers()[1][1].experts
    at = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(tensors[f"{at}.w1.weight"], experts.w_up_EUD[2, :48])
    assert torch.equal(tensors[f"{at}.w3.weight"], experts.w_up_EUD[2, 48:])
    assert torch.equal(tensors[f"{at}.w2.weight"], experts.w_down_EDF[2])


def test_softmax_after_topk_is_mixtral_too(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    # softmax over the chosen logits = softmax over all, renormalised over the chosen.
    model = trained_model(make_checkpoint("llama"), order="topk_then_score", renormalise=False, top_k=3)
    assert_same_logits(reload(write(model, tmp_path / "hf")), model)


@pytest.mark.parametrize("tied", [False, True])
def test_many_files_reload(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    limit = 60_000
    monkeypatch.setattr(export_module.TensorFiles.__init__, "__defaults__", (limit,))
    model = trained_model(make_checkpoint("llama", tied=tied))
    folder = write(model, tmp_path / "hf")
    files = weight_files(folder)
    assert len(files) > 3
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert {path.name for path in folder.glob("*.safetensors")} == {path.name for path in files}
    payload = 0
    for path in files:
        sizes = [tensor.numel() * 4 for tensor in load_file(path).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
        payload += sum(sizes)
    assert json.loads((folder / INDEX_NAME).read_text())["metadata"]["total_size"] == payload
    assert_same_logits(reload(folder), model)


def test_bf16_files(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = trained_model(make_checkpoint("llama"))
    folder = write(model, tmp_path / "hf", torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    round_parameters(model)
    assert_same_logits(reload(folder), model)


@pytest.mark.parametrize(
    ("family", "options", "layers", "router", "reason"),
    [
        ("qwen3", {"tied": True}, "last:1", {"score": "sigmoid"}, "Qwen3-MoE's gates are a softmax"),
        ("gpt2", {"tied": True}, "all", {}, "no class of transformers holds MoE layers in a model of gpt2"),
        ("gemma3_text", {"tied": True}, "all", {}, "in a model of gemma3_text"),
        ("llama", {}, "every:2", {}, "2 of 3 are MoE layers"),
        ("llama", {"mlp_bias": True}, "all", {}, "Mixtral has no biases"),
        ("llama", {"attention_bias": True}, "all", {}, "Mixtral has no biases"),
        ("llama", {}, "all", {"score": "sigmoid"}, "this router's are a sigmoid"),
        ("llama", {}, "all", {"renormalise": False}, "renormalised to sum to 1, and this router's are not"),
    ],
)
def test_what_is_no_mixtral_goes_into_our_own_format(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    family: str,
    options: dict[str, Any],
    layers: str,
    router: dict[str, Any],
    reason: str,
) -> None:
    model = trained_model(make_checkpoint(family, **options), layers, **router)
    exporter, unsupported_reasons = choose_exporter(describe_model(model))
    assert exporter.name == "graft"
    assert not exporter.is_native
    assert any(reason in unsupported_reason for unsupported_reason in unsupported_reasons), (
        unsupported_reasons
    )
    folder = write(model, tmp_path / "hf")
    loaded = load_graft(folder)
    assert_same_logits(loaded.module, model)
    assert [index for index, _ in loaded.moe_layers()] == [index for index, _ in model.moe_layers()]
    assert ("lm_head.weight" in names_in(folder)) == (not options.get("tied", False))
    with pytest.raises(ValueError, match="graft_moe"):
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def test_our_format_in_bf16_keeps_routers_in_fp32(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = trained_model(make_checkpoint("gemma3_text", tied=True))
    module = load_graft(write(model, tmp_path / "hf", torch.bfloat16)).module
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    assert module.lm_head.weight is module.model.embed_tokens.weight
    round_parameters(model, kept=".router.")
    assert_same_logits(module.float(), model)


def test_load_graft_refuses_what_is_not_its_own(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its model_type is 'llama', not 'graft_moe'"):
        load_graft(make_checkpoint("llama"))
    folder = write(trained_model(make_checkpoint("gemma3_text", tied=True)), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    del config["moe_layers"][1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"missing tensors .*layers\.1\.mlp\..*unexpected .*layers\.1\.mlp\."
    ):
        load_graft(folder)


def test_the_verification_reloads_and_generates(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = trained_model(make_checkpoint("llama"))
    folder = write(model, tmp_path / "hf")
    tokens = some_tokens()
    with torch.no_grad():
        logits = model.module(input_ids=tokens).logits
    report = verify_export(MixtralExporter(), folder, tokens, logits)
    assert (report.format, report.is_native, report.path) == ("mixtral", True, folder)
    assert report.logits.relative <= 1e-4
    sample = json.loads(report.sample)
    assert sample["text"].startswith(sample["prompt"])
    with pytest.raises(ExactnessError, match=r"as mixtral does not compute what was trained"):
        verify_export(MixtralExporter(), folder, tokens, logits * 1.001)


def test_a_swapped_gate_would_be_found(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The verification is as good as what it refuses.
    plain = MixtralExporter.expert_name

    def swapped(self: MixtralExporter, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        other: dict[Matrix, Matrix] = {"gate": "up", "up": "gate", "down": "down"}
        return plain(self, moe, expert, other[matrix] if expert == 0 else matrix, bias)

    monkeypatch.setattr(MixtralExporter, "expert_name", swapped)
    model = trained_model(make_checkpoint("llama", num_hidden_layers=1))
    with pytest.raises(ExactnessError):  # whose tensors are all there, in their shapes
        write(model, tmp_path / "hf")


def failing(model: HFModel, after: int) -> Iterator[tuple[str, Tensor]]:
    """The host's tensors, until something breaks."""
    for number, item in enumerate(model.module.state_dict().items()):
        if number == after:
            raise RuntimeError("the power went out")
        yield item


def test_a_failing_export_leaves_the_old_folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = trained_model(make_checkpoint("llama"))
    folder = write(model, tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.module.model.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="the power went out"):
        export(model, MixtralExporter(), failing(model, 7), folder, torch.float32, writes=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # The next one succeeds, replaces the folder as a whole, and leaves nothing beside it.
    (folder / "of-the-old-export").touch()
    write(model, folder)
    assert not (folder / "of-the-old-export").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert_same_logits(reload(folder), model)


def test_the_other_ranks_take_part_and_write_nothing(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = trained_model(make_checkpoint("llama"))
    gathered = []
    tensors = ((name, gathered.append(name) or tensor) for name, tensor in model.module.state_dict().items())
    export(model, MixtralExporter(), tensors, tmp_path / "hf", torch.float32, writes=False)
    assert gathered == list(model.module.state_dict())
    assert not list(tmp_path.iterdir())


def test_companions_travel_along(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = trained_model(make_checkpoint("llama"))
    source = tmp_path / "source"
    source.mkdir()
    companions = {"tokenizer.json", "merges.txt", "tekken.json", "spiece.model", "generation_config.json"}
    for name in [*companions, "model.safetensors", "training_args.bin", "README.md"]:
        (source / name).write_text("{}")
    model.folder = source
    folder = write(model, tmp_path / "hf")
    assert {path.name for path in folder.iterdir()} == companions | {"model.safetensors", "config.json"}
    assert (folder / "model.safetensors").stat().st_size > 2


def test_one_tensor_above_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    specs = [
        TensorSpec(name, torch.float32, (size,)) for name, size in {"a": 1, "b": 1, "c": 5, "d": 1}.items()
    ]
    files = TensorFiles(tmp_path, specs, max_bytes=8)
    for spec in reversed(specs):
        files.write(spec.name, torch.full(spec.shape, 7.0))
    files.finish()
    held = [sorted(load_file(path)) for path in weight_files(tmp_path)]
    assert held == [["a", "b"], ["c"], ["d"]]


def test_tensors_are_written_piece_by_piece_and_aligned(tmp_path: Path) -> None:
    specs = [TensorSpec("odd", torch.bfloat16, (3,)), TensorSpec("wide", torch.float32, (2, 2))]
    files = TensorFiles(tmp_path, specs)
    # In any order, in any dtype, from memory that changes afterwards.
    source = torch.tensor([3.0, 4.0], dtype=torch.float64)
    files.write("wide", source, offset=2)
    source += 1
    files.write("odd", torch.tensor([1.0, 2.0, 3.0]))
    files.write("wide", torch.tensor([1.0, 2.0]))
    files.finish()
    held = load_file(tmp_path / "model.safetensors")
    assert {name: value.tolist() for name, value in held.items()} == {
        "odd": [1.0, 2.0, 3.0],
        "wide": [[1.0, 2.0], [3.0, 4.0]],
    }
    assert held["odd"].dtype == torch.bfloat16
    header = json.loads((tmp_path / "model.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    assert header["wide"]["data_offsets"][0] % 4 == 0

"""Every family of mixtures against transformers' own class: its logits, gradients and files judge Graft's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.errors import ModelError
from recipes.models.export.write_export import export
from recipes.models.families import families
from recipes.models.families.open_mixture import open_mixture, source_router
from recipes.models.families.source_mixture import SourceMixture
from recipes.models.hf.hf_model import HFModel
from recipes.upcycling.sharded.mixture_model import mixture_model
from recipes.upcycling.sharded.sharded_models import materialize
from tests.grid import each
from tests.recipes.models.families.family_configs import CONFIGS, family_config
from tests.shared_runs import once, shared_folder

# Of the largest: sums in another order.
_TOLERANCE = 1e-5


def make(family: str, dtype: str = "float32", **changes: Any) -> Path:
    """Saves a random model of a family by transformers, all of its tensors other than as they are drawn."""
    return once(_save, family, dtype, sorted(changes.items()))


def _save(family: str, dtype: str, changes: list[tuple[str, Any]]) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = shared_folder("-".join(map(str, ("mixture", family, dtype, *sum(changes, ())))))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **family_config(family) | dict(changes))
        )
        tensors = model.state_dict()
        for name, tensor in tensors.items():
            if tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
            elif "decay" not in name and "slope" not in name and tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def theirs(folder: Path) -> Any:
    """transformers' own model in fp32, with the plainest of its experts."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, experts_implementation="eager").eval()


def ours(mixture: SourceMixture) -> HFModel:
    """The model with Graft's layers, in memory."""
    return materialize(mixture_model(mixture))


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files, as safetensors itself reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def write(mixture: SourceMixture, model: HFModel, tensors: Iterable[tuple[str, Tensor]], out: Path) -> Path:
    """Writes tensors in the mixture's own format."""
    export(model, mixture.format, tensors, out, mixture.format.dtype, writes=True)
    return out


def state(model: HFModel) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by name."""
    yield from model.module.state_dict().items()


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Of the largest entry of the first."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


def test_every_family_has_a_config_here() -> None:
    """So that a new one is held to all that follows."""
    assert set(families()) == set(CONFIGS)


@each("family", sorted(CONFIGS))
def test_logits_and_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Gradients are compared by their names on disk, under which transformers itself saves them."""
    folder = make(family)
    reference, mixture = theirs(folder), open_mixture(folder)
    model = ours(mixture)
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    want = reference(input_ids=tokens, labels=tokens, use_cache=False)
    got = model.module(input_ids=tokens, labels=tokens)
    assert largest_difference(want.logits.detach(), got.logits.detach()) < _TOLERANCE
    want.loss.backward()
    got.loss.backward()
    for parameter in reference.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    reference.save_pretrained(tmp_path / "theirs")
    grads = {name: p.grad for name, p in model.module.named_parameters()}
    found = ((name, tensor if grads.get(name) is None else grads[name]) for name, tensor in state(model))
    write(mixture, model, found, tmp_path / "ours")
    expected, there = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    trained = [
        name for name, tensor in expected.items() if tensor.any() and not name.endswith("correction_bias")
    ]
    assert len(trained) > len(expected) / 2
    for name in trained:
        assert largest_difference(expected[name], there[name]) < 10 * _TOLERANCE, name


@each("family", sorted(CONFIGS))
def test_what_is_not_trained_is_written_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    """In bf16, with what transformers keeps in fp32 beside it, and all keys of the config."""
    folder = make(family, "bfloat16")
    mixture = open_mixture(folder)
    out = write(mixture, (model := ours(mixture)), state(model), tmp_path / "out")
    before, after = stored(folder), stored(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    configs = [json.loads((each / "config.json").read_text()) for each in (folder, out)]
    assert configs[0] == configs[1]


def _changed(folder: Path, tmp_path: Path, change: Any) -> Path:
    """A copy whose tensors are changed."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    tensors = {name: tensor.clone() for name, tensor in stored(folder).items()}
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    save_file(change(tensors), copy / "model.safetensors", {"format": "pt"})
    return copy


def test_what_nobody_computes_with_is_carried(tmp_path: Path) -> None:
    """A layer that predicts further tokens, which transformers skips, and a key that it does not know."""
    extra = {"model.layers.3.mlp.gate.weight": torch.randn(8, 32), "mtp.fp8": torch.ones(3, 5).to(torch.int8)}
    folder = _changed(make("qwen3_moe"), tmp_path, lambda tensors: tensors | extra)
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    mixture = open_mixture(folder)
    assert any("does not read 2 tensors of its files, model.layers.3" in note for note in mixture.notes)
    out = write(mixture, (model := ours(mixture)), state(model), tmp_path / "out")
    after = stored(out)
    for name, tensor in extra.items():
        assert torch.equal(after[name], tensor)
    assert json.loads((out / "config.json").read_text()) == config


def test_stacked_experts_are_read_and_written_as_such(tmp_path: Path) -> None:
    """Tools that save what transformers has in memory write Qwen3's experts stacked."""

    def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for layer in (0, 2):
            at = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                torch.stack([tensors[f"{at}.{e}.{matrix}_proj.weight"] for e in range(8)])
                for matrix in ("gate", "up", "down")
            )
            kept |= {f"{at}.gate_up_proj": torch.cat([gate, up], 1), f"{at}.down_proj": down}
        return kept

    alone = make("qwen3_moe")
    folder = _changed(alone, tmp_path, stack)
    mixture = open_mixture(folder)
    assert mixture.format.layouts == ("fused",)
    model, tokens = ours(mixture), torch.arange(20).view(2, 10)
    want = ours(open_mixture(alone)).module(input_ids=tokens).logits
    assert torch.equal(model.module(input_ids=tokens).logits, want)
    after = stored(write(mixture, model, state(model), tmp_path / "out"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in stored(folder).items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n: x for n, x in t.items() if ".experts.3.w2" not in n}, r"experts\.3\.w2\.weight"),
        (lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"}, "no file holds lm_head.weight"),
        (
            lambda t: {n: x.t().contiguous() if ".w1." in n else x for n, x in t.items()},
            r"is \[32, 48\] in its files and \[48, 32\] by config.json",
        ),
        (
            lambda t: {n: x.to(torch.int8) if "experts.3.w2" in n else x for n, x in t.items()},
            r"experts\.3\.w2\.weight is of torch.int8.*Dequantise",
        ),
    ],
)
def test_files_that_are_not_whole_are_refused_by_name(change: Any, words: str, tmp_path: Path) -> None:
    """Before a weight is read."""
    folder = _changed(make("mixtral"), tmp_path, change)
    with pytest.raises(ModelError, match=words):
        open_mixture(folder)


@each(
    "family, changes, words",
    [
        ("mixtral", {"num_experts_per_tok": 9}, "top_k=9, with 8 experts: a token cannot use more"),
        ("mixtral", {"num_experts_per_tok": 1}, "top_k=1: the only weight is then always 1"),
        ("glm4_moe", {"n_group": 3, "topk_group": 1}, "num_groups=3, with 8 experts: groups are of one size"),
        ("deepseek_v3", {"n_group": None, "topk_group": None}, "of another type"),
    ],
)
def test_a_config_that_no_router_has_is_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Each is built by transformers, and fails when it runs, or has a router that cannot be trained."""
    config = family_config(family) | {"model_type": family} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=f"has no router for its config.json: .*{words}.*Give another mixture"
    ):
        source_router(tmp_path)


def test_code_in_the_folder_of_a_family_is_not_run(tmp_path: Path) -> None:
    """Folders were published before transformers had the class, and their tokenizers may be trusted still."""
    folder = _changed(make("deepseek_v3"), tmp_path, dict)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text("raise AssertionError('it ran')\n")
    mixture = open_mixture(folder, trust_remote_code=True)
    assert type(ours(mixture).module).__name__ == "DeepseekV3ForCausalLM"
    mixture.format.open(folder, trust_remote_code=True)


def test_a_dense_model_and_a_family_without_adapter_are_refused(tmp_path: Path) -> None:
    """Each with what to do instead."""
    for kind, words in (("llama", "it is dense.*recipe=upcycle"), ("gpt_oss", "no adapter.*mixtral")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ModelError, match=words):
            open_mixture(tmp_path)

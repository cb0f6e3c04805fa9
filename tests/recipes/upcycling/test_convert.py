"""Conversion from files to files gives, bit for bit, what the surgery in memory exports."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.errors import ConfigError, ModelError
from moe.routers import router_class
from moe.routers.configs import RouterConfig
from moe.routers.configs.analytical_config import AnalyticalConfig
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.configs.one_plus_config import OnePlusConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.configs.unit_linear_config import UnitLinearConfig
from moe.upcycle import upcycle_methods
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.configs.cmoe_config import CMoEConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.configs.llama_moe_config import LlamaMoEConfig
from moe.upcycle.configs.llama_moe_v2_config import LlamaMoEV2Config
from moe.upcycle.configs.moefication_config import MoEficationConfig
from moe.upcycle.configs.random_init_config import RandomConfig
from moe.upcycle.configs.shared_routed_config import SharedRoutedConfig
from moe.upcycle.configs.snake_config import SnakeConfig
from recipes.models.export import choose_exporter
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import export
from recipes.models.hf.ffn_blocks import find_ffns
from recipes.models.hf.hf_model import load_model
from recipes.models.hf.weight_files import weight_files
from recipes.runtime.claim import InUseError
from recipes.upcycling.convert.conversion import RECORD, convert
from recipes.upcycling.convert.conversion_plan import ConversionRequest, plan_conversion
from recipes.upcycling.convert.folder_check import compare_folders, load_any
from tests.conftest import VOCABULARY, MakeCheckpoint
from tests.moe.dispatch.gathered import gathered
from tests.recipes.models.whole_surgery import Surgery, swap

pytestmark = pytest.mark.usefixtures("one_thread")

TOPK = TopKConfig(top_k=2)
COPY = CopyConfig(num_experts=4)
# Family, options of its checkpoint, method, router.
CASES: list[tuple[str, dict[str, Any], UpcycleConfig, RouterConfig]] = [
    ("llama", {}, COPY, TOPK),
    ("llama", {"sharded": True, "tied": True}, replace(COPY, noise_std=0.3), TOPK),
    ("llama", {"mlp_bias": True}, replace(COPY, permute=True), TOPK),
    ("llama", {}, replace(COPY, layers="every:2"), DeepSeekV3Config(top_k=2)),
    ("mistral", {"dtype": "bfloat16"}, RandomConfig(num_experts=4, expert_width=24), TOPK),
    ("qwen2", {"dtype": "float16"}, replace(COPY, layers="last:1"), TOPK),
    ("qwen3", {"tied": True}, COPY, TOPK),
    ("gemma2", {"tied": True}, COPY, TOPK),
    ("gemma3_text", {"tied": True}, replace(COPY, noise_std=0.1), TOPK),
    ("olmo2", {"sharded": True}, COPY, TOPK),
    ("phi", {}, replace(COPY, noise_std=0.1), TOPK),
    ("phi3", {}, replace(COPY, permute=True), TOPK),
    ("gpt2", {"tied": True}, replace(COPY, noise_std=0.1), TOPK),
    ("gpt_neox", {}, COPY, TOPK),
    ("starcoder2", {}, replace(COPY, permute=True), TOPK),
]


def request(dense: Path, method: UpcycleConfig = COPY, router: RouterConfig = TOPK, **more: Any) -> Any:
    """A request with seed 3, as `in_memory` has it."""
    return ConversionRequest(dense=dense, method=method, router=router, seed=3, **more)


def in_memory(
    dense: Path,
    method: UpcycleConfig,
    router: RouterConfig,
    folder: Path,
    dtype: torch.dtype,
    statistics: dict[int, dict[str, Tensor]] | None = None,
) -> Path:
    """The same mixture by the surgery and the export of a training run."""
    model = load_model(dense)
    model.module.to(dtype)
    surgery = Surgery(
        method=upcycle_methods()[method.name](method).for_router(router),
        make_router=lambda width, experts: router_class(router.name)(router, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=3,
    )
    swap(model, surgery, statistics=statistics)
    exporter, _ = choose_exporter(describe_model(model))
    export(model, exporter, model.module.state_dict().items(), folder, dtype, writes=True)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Everything in a folder's files."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= load_file(path)
    return found


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Bit for bit, config too."""
    first, second = tensors_of(ours), tensors_of(theirs)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("family", "options", "method", "router"), CASES)
def test_files_are_those_of_the_surgery_in_memory(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    family: str,
    options: dict[str, Any],
    method: UpcycleConfig,
    router: RouterConfig,
) -> None:
    dense = make_checkpoint(family, **options)
    dtype = getattr(torch, options.get("dtype", "float32"))
    result = convert(plan_conversion(request(dense, method, router)), tmp_path / "out")
    assert result.path == tmp_path / "out" and result.bytes_written == sum(
        t.numel() * t.element_size() for t in tensors_of(result.path).values()
    )
    assert_same_files(result.path, in_memory(dense, method, router, tmp_path / "memory", dtype))
    assert (result.path / "tokenizer.json").is_file()


# What they were told of text; cmoe's and moefication's routers take rows of the dense network.
TOLD: list[tuple[str, UpcycleConfig, RouterConfig]] = [
    ("llama", CMoEConfig(num_experts=4, num_shared=2), AnalyticalConfig(top_k=2)),
    ("phi3", CMoEConfig(num_experts=4, num_shared=0), AnalyticalConfig(top_k=2)),
    ("llama", LlamaMoEV2Config(num_experts=3, layers="all"), TOPK),
    ("qwen2", LlamaMoEConfig(num_experts=4, split="gradient"), TOPK),
    ("llama", SnakeConfig(num_experts=4), OnePlusConfig(top_k=2)),
    ("relu", MoEficationConfig(num_experts=4), UnitLinearConfig(top_k=2)),
    ("llama", SharedRoutedConfig(order="activation_rate"), TOPK),
]


@pytest.mark.parametrize(("family", "method", "router"), TOLD)
def test_methods_that_look_at_text(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str, method: UpcycleConfig, router: RouterConfig
) -> None:
    dense = make_checkpoint("llama", hidden_act="relu") if family == "relu" else make_checkpoint(family)
    chosen = upcycle_methods()[method.name](method).for_router(router)
    model = load_model(dense)
    statistics = {
        site.layer: gathered(chosen, site.weights) for site in find_ffns(model.module, model.config)
    }
    convert(plan_conversion(request(dense, method, router), statistics), tmp_path / "out")
    memory = in_memory(dense, method, router, tmp_path / "memory", torch.float32, statistics)
    assert_same_files(tmp_path / "out", memory)
    with pytest.raises(ConfigError, match="needs statistics"):
        plan_conversion(request(dense, method, router))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "phi3", "gpt2"])
def test_the_gate_holds_after_reloading(make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str) -> None:
    dense = make_checkpoint(family)
    conversion = plan_conversion(request(dense))
    assert conversion.claims_exact
    convert(conversion, tmp_path / "out")
    tokens = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    report = compare_folders(dense, tmp_path / "out", tokens, gradients=True)
    assert report.agrees and report.logits.relative <= 1e-4 and report.logits.kl < 1e-6
    assert report.gradients is not None and "model.norm.weight" in report.gradients or family == "gpt2"
    assert max(report.gradients.values()) < 1e-4, next(iter(report.gradients.items()))
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["claims_exact"] and record["method"]["name"] == "copy"


def test_a_mixture_that_is_another_function_fails_the_gate(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense = make_checkpoint("llama")
    conversion = plan_conversion(request(dense, replace(COPY, noise_std=0.5)))
    assert not conversion.claims_exact
    convert(conversion, tmp_path / "out")
    tokens = torch.randint(1, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
    assert not compare_folders(dense, tmp_path / "out", tokens).agrees


class _KilledError(Exception):
    pass


def _dies_after(count: int) -> Any:
    seen: Iterator[int] = iter(range(10**9))

    def progress(num_bytes: int) -> None:
        if next(seen) == count:
            raise _KilledError

    return progress


@pytest.mark.usefixtures("journalled")
@pytest.mark.parametrize("count", [0, 7, 40])
def test_an_interrupted_conversion_goes_on(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, count: int
) -> None:
    dense = make_checkpoint("llama")
    method = replace(COPY, noise_std=0.2)
    whole = convert(plan_conversion(request(dense, method)), tmp_path / "whole")
    with pytest.raises(_KilledError):
        convert(plan_conversion(request(dense, method)), tmp_path / "out", _dies_after(count))
    assert not (tmp_path / "out").exists()
    result = convert(plan_conversion(request(dense, method)), tmp_path / "out")
    assert (result.resumed > 0) == (count > 0)
    assert result.bytes_written < whole.bytes_written or count == 0
    assert_same_files(result.path, whole.path)
    assert not list(tmp_path.glob(".tmp-*"))


def _zero(path: Path) -> None:
    """Loses the first half of a file's data."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as file:
        file.seek(8 + length)
        file.write(bytes((path.stat().st_size - 8 - length) // 2))


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "zeros": lambda folder: _zero(folder / "model.safetensors"),
    "cut": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "missing": lambda folder: (folder / "model.safetensors").unlink(),
}


@pytest.fixture
def journalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of work is journalled at once."""
    monkeypatch.setattr("recipes.upcycling.convert.conversion._JOURNAL_INTERVAL_S", 0.0)


@pytest.mark.usefixtures("journalled")
@pytest.mark.parametrize("damage", _DAMAGES)
def test_pieces_that_were_lost_meanwhile_are_made_again(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, damage: str
) -> None:
    dense = make_checkpoint("llama")
    whole = convert(plan_conversion(request(dense)), tmp_path / "whole")
    with pytest.raises(_KilledError):
        convert(plan_conversion(request(dense)), tmp_path / "out", _dies_after(40))
    _DAMAGES[damage](tmp_path / ".tmp-out")
    result = convert(plan_conversion(request(dense)), tmp_path / "out")
    assert result.lost > 0
    assert_same_files(result.path, whole.path)


def _interrupted(dense: Path, out: Path) -> Path:
    with pytest.raises(_KilledError):
        convert(plan_conversion(request(dense)), out, _dies_after(9))
    return out.with_name(f".tmp-{out.name}") / "progress.json"


@pytest.mark.usefixtures("journalled")
@pytest.mark.parametrize(
    "change",
    [
        lambda old: b"[" * 100_000,
        lambda old: b"[]",
        lambda old: b'{"identity": 5}',
        lambda old: old[: len(old) // 2],
        lambda old: json.dumps(json.loads(old) | {"done": ["a"]}).encode(),
        lambda old: json.dumps(json.loads(old) | {"done": {"a": [["x", "y", 1]]}}).encode(),
        lambda old: json.dumps(json.loads(old) | {"done": {"a": [["gone", -1, 5, 0]]}}).encode(),
    ],
)
def test_a_damaged_journal_is_not_believed(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    dense = make_checkpoint("llama", num_hidden_layers=1)
    journal = _interrupted(dense, tmp_path / "out")
    journal.write_bytes(change(journal.read_bytes()))
    assert convert(plan_conversion(request(dense)), tmp_path / "out").resumed == 0


@pytest.mark.usefixtures("journalled")
def test_a_piece_that_the_journal_forgot_is_found_before_the_end(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense = make_checkpoint("llama", num_hidden_layers=1)
    journal = _interrupted(dense, tmp_path / "out")
    content = json.loads(journal.read_text())
    next(iter(content["done"].values())).pop()
    journal.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="of its elements were not written"):
        convert(plan_conversion(request(dense)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # What led there is not taken over once more.
    assert convert(plan_conversion(request(dense)), tmp_path / "out").resumed == 0


def test_a_second_conversion_to_the_same_folder_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense = make_checkpoint("llama", num_hidden_layers=1)

    def again(num_bytes: int) -> None:
        with pytest.raises(InUseError, match=r"--out='.*out': it is in use by process"):
            convert(plan_conversion(request(dense)), tmp_path / "out")
        raise _KilledError

    with pytest.raises(_KilledError):
        convert(plan_conversion(request(dense)), tmp_path / "out", again)
    convert(plan_conversion(request(dense)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile_is_kept(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    dense, kept = make_checkpoint("llama", num_hidden_layers=1), tmp_path / "out" / "kept"

    def appears(num_bytes: int) -> None:
        kept.parent.mkdir(exist_ok=True)
        kept.touch()

    with pytest.raises(ConfigError, match="it exists already"):
        convert(plan_conversion(request(dense)), tmp_path / "out", appears)
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


@pytest.mark.usefixtures("journalled")
def test_what_another_conversion_left_is_not_gone_on_with(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense = make_checkpoint("llama")
    with pytest.raises(_KilledError):
        convert(plan_conversion(request(dense)), tmp_path / "out", _dies_after(20))
    other = plan_conversion(request(dense, replace(COPY, noise_std=0.2)))
    assert convert(other, tmp_path / "out").resumed == 0


def test_output_that_exists_is_left_alone(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="it exists already"):
        convert(plan_conversion(request(make_checkpoint("llama"))), tmp_path / "out")


def test_no_room_is_said_before_anything_is_written(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(100, 100, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(Exception, match="the MoE model needs"):
        convert(plan_conversion(request(make_checkpoint("llama"))), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_dtype_and_a_head_of_its_own(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    dense = make_checkpoint("llama", tied=True)
    convert(plan_conversion(request(dense, dtype=torch.bfloat16, untie=True)), tmp_path / "out")
    held = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["dtype"] == "bfloat16"
    model = load_any(tmp_path / "out")
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_fused_layout_computes_the_same(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    dense = make_checkpoint("qwen3")
    for layout in ("per_expert", "fused"):
        convert(plan_conversion(request(dense, layout=layout)), tmp_path / layout)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors_of(tmp_path / "fused"))
    tokens = torch.randint(1, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
    drift = compare_folders(tmp_path / "per_expert", tmp_path / "fused", tokens).logits
    assert drift.max_diff == 0.0


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"target": "mixtral"}, r"--target='mixtral': Mixtral holds models of llama, mistral, not of qwen3"),
        ({"target": "graft", "layout": "fused"}, r"--layout='fused': the format graft is written per_expert"),
        ({"method": replace(COPY, layers=[7])}, r"upcycle.layers"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    make_checkpoint: MakeCheckpoint, more: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        plan_conversion(request(make_checkpoint("qwen3"), **more))


def _copied(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_checkpoint("llama"), tmp_path / "dense"))


def test_weights_that_are_missing_left_over_or_of_another_shape(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense = _copied(make_checkpoint, tmp_path)
    held = load_file(dense / "model.safetensors")
    save_file(held | {"model.extra.weight": torch.zeros(2)}, dense / "model.safetensors")
    with pytest.raises(ModelError, match=r"no place for, model\.extra\.weight the first"):
        plan_conversion(request(dense))
    # Versions of transformers before 4.32 saved these; nobody reads them.
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(held | {old: torch.zeros(4)}, dense / "model.safetensors")
    assert plan_conversion(request(dense)).skipped == (old,)
    save_file(held | {"model.norm.weight": torch.zeros(7)}, dense / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \[7\] in its files and \[32\]"):
        plan_conversion(request(dense))
    del held["model.norm.weight"]
    save_file(held, dense / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 weights are missing from its files, model\.norm\.weight"):
        plan_conversion(request(dense))


def test_files_that_are_cut_short_or_no_safetensors(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    dense = _copied(make_checkpoint, tmp_path)
    path = dense / "model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:5], b"\xff" * 64, (20).to_bytes(8, "little") + b"x" * 20):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match="Download that file again"):
            plan_conversion(request(dense))


def test_a_family_that_computes_something_else_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) + x)
    with pytest.raises(ModelError, match="computes something else than a feed-forward network"):
        plan_conversion(request(make_checkpoint("llama")))


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP])
def test_two_kinds_of_disk(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not copy between two files, this process does; other errors stay errors."""
    dense = make_checkpoint("llama")
    convert(plan_conversion(request(dense)), tmp_path / "by_the_system")

    def refuse(*arguments: Any) -> int:
        raise OSError(code, "not between these")

    monkeypatch.setattr("os.copy_file_range", refuse)
    monkeypatch.setattr("recipes.models.safetensors.tensor_files._READ_BYTES", 1000)
    convert(plan_conversion(request(dense)), tmp_path / "by_hand")
    assert_same_files(tmp_path / "by_hand", tmp_path / "by_the_system")
    code = errno.EIO
    with pytest.raises(OSError, match="not between these"):
        convert(plan_conversion(request(dense)), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()

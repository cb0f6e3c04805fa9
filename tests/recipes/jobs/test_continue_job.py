"""Runs that go on training a mixture: on every engine what one rank does, and written back as it came."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.jobs.export_run import ExportRequest, export_run
from tests.grid import each
from tests.recipes.jobs.job_runs import StopAt, job, process, rows, same_training
from tests.recipes.models.families.family_configs import family_config

_ONLY: dict[str, Any] = {f"model.{key}": None for key in ("vocab_size", "hidden_size", "intermediate_size")}
_ONLY |= {
    f"model.{key}": None for key in ("num_layers", "num_heads", "num_kv_heads", "steps", "warmup_steps")
}
_ONLY |= {"+recipe": "continue", "upcycle.num_experts": None, "train.steps": 4, "train.eval_every": 4}


def _mixture(family: str, folder: Path, tokenizer: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **family_config(family) | {"vocab_size": 300})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("correction_bias"):
                tensor.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder / family)
    shutil.copytree(tokenizer, folder / family, dirs_exist_ok=True)
    return folder / family


def _options(dense: Path, text: str, name: str, **more: Any) -> dict[str, Any]:
    return _ONLY | {"dense": dense, "data.path": text, "run.name": name} | more


@pytest.mark.slow
@pytest.mark.distributed
def test_from_start_to_export(workplace: Path, text: str, tokenizer_folder: Path) -> None:
    dense, runs = _mixture("deepseek_v3", workplace, tokenizer_folder), workplace / "outputs"
    whole = job(workplace, _options(dense, text, "whole"))
    assert whole.code == 0, whole.err
    assert "moe: DeepSeek-V3, router deepseek_v3: top_k=2" in whole.out and ": exact\n" in whole.out
    summary = json.loads((runs / "whole" / "summary.json").read_text())
    assert [row["label"] for row in summary["results"]] == ["Mixture (start)", "MoE (continued)"]
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, runs / "whole" / "hf"))
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert any("experts.7." in name for name in changed) and any(
        "correction_bias" in name for name in changed
    )
    configs = [json.loads((each / "config.json").read_text()) for each in (dense, runs / "whole" / "hf")]
    assert configs[0] == configs[1]

    stopped = job(workplace, _options(dense, text, "stopped"), StopAt("moe", 1))
    assert stopped.code == 130, stopped.err
    resumed = job(workplace, _options(dense, text, "stopped", resume="auto"))
    assert resumed.code == 0, resumed.err
    same_training(runs / "stopped", runs / "whole", ("moe",))

    exported = export_run(ExportRequest(runs / "whole"), workplace / "exported")
    assert exported.format == "deepseek_v3"
    again = load_file(workplace / "exported" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in after.items())


@pytest.mark.slow
def test_what_a_run_exports_in_graft_s_own_format_is_trained_on(tmp_path: Path, text: str) -> None:
    """With the router that it was trained with; without training, the files are the same bytes."""
    runs = tmp_path / "outputs"
    options = {"data.path": text, "train.steps": 2, "train.eval_every": 2, "optim.schedule.warmup_steps": 1}
    made = job(tmp_path, options | {"run.name": "made", "router": "ssr", "compare.cpt": False})
    assert made.code == 0, made.err
    on = job(tmp_path, _options(runs / "made" / "hf", text, "on", **options))
    assert on.code == 0, on.err
    assert "moe: Graft's own format, router ssr: top_k=2" in on.out
    row = rows(runs / "on", "moe")[0]
    assert row["val_loss"] == pytest.approx(rows(runs / "made", "moe")[-1]["val_loss"], rel=1e-6)
    still = job(tmp_path, _options(runs / "on" / "hf", text, "still") | {"train.steps": 0})
    assert still.code == 0, still.err
    for name in ("model.safetensors", "config.json"):
        assert (runs / "still" / "hf" / name).read_bytes() == (runs / "on" / "hf" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.distributed
@each(
    "family, engine",
    [("qwen2_moe", "native"), ("granitemoe", "deepspeed"), ("qwen3_moe", "megatron")],
)
def test_two_ranks_with_half_the_experts_each_do_what_one_does(
    family: str, engine: str, workplace: Path, text: str, tokenizer_folder: Path
) -> None:
    dense = _mixture(family, workplace, tokenizer_folder)
    options = _options(dense, text, f"{family}-one", **{"train.steps": 2, "optim.schedule.warmup_steps": 1})
    alone = job(workplace, options)
    assert alone.code == 0, alone.err
    spread = {"run.name": f"{family}-two", "engine": engine, "engine.expert_parallel": 2}
    if engine == "deepspeed":
        # Whole parameters are gathered for the export while ZeRO-3 has some in flight.
        spread["engine.zero_stage"] = 3
    pair = process(workplace, options | spread, ranks=2)
    assert pair.code == 0, pair.err
    one, two = (rows(workplace / "outputs" / f"{family}-{which}", "moe") for which in ("one", "two"))
    for row, same in zip(two, one, strict=True):
        for name in {"loss", "val_loss", "grad_norm"} & same.keys():
            assert row[name] == pytest.approx(same[name], rel=2e-4), (row["step"], name)


@each(
    "changes, words",
    [
        ({"router": "deepseek_v3"}, "router='deepseek_v3': the mixture keeps the router"),
        ({"upcycle.num_experts": 16}, "upcycle.num_experts=16: the mixture keeps the router and the experts"),
        ({"prompts.path": "prompts.yaml"}, "prompts.path='prompts.yaml': the mixture keeps the router"),
        (
            {"continue.bias_rate": 0.1},
            "continue.bias_rate=0.1: this mixture's router, topk, has no such option",
        ),
        ({"dense": None}, "dense=None: there is no mixture to go on with"),
        ({"engine": "megatron"}, "the Megatron engine takes the families"),
        ({"engine": "native", "engine.expert_parallel": 3}, "engine.expert_parallel=3"),
    ],
)
def test_what_would_make_another_model_is_refused(
    changes: dict[str, Any], words: str, workplace: Path, text: str, tokenizer_folder: Path
) -> None:
    dense = _mixture("olmoe", workplace, tokenizer_folder)
    refused = job(workplace, _options(dense, text, "refused") | changes)
    assert refused.code == 2, refused.out
    assert words in refused.err
    assert not (workplace / "outputs" / "refused").exists()

"""The main job from end to end, on tiny settings: what it leaves, and that its figures fit together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from recipes.data.packing import OrderedDataset, PackedDataset
from tests.recipes.jobs.job_runs import Ended, StopAt, job, loads, rows, steps, summary, weights, write_text


def test_a_run_leaves_everything_that_was_promised(first: Path) -> None:
    names = {path.name for path in first.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "load.jsonl", "summary.json", "report.html"} <= names
    assert {"checkpoints", "hf", "cpt", "figures", "run.json"} <= names
    assert not [str(path) for path in first.rglob("*") if ".tmp-" in path.name]
    # Saved every 2 of 6 steps, and the last two are kept.
    assert steps(first / "checkpoints") == steps(first / "cpt" / "checkpoints") == [4, 6]


def test_its_figures_fit_together(first: Path) -> None:
    dense, cpt, moe = summary(first)["results"]
    assert [row["model"] for row in (dense, cpt, moe)] == ["dense", "cpt", "moe"]
    # 6 steps of 4 samples of 16 tokens
    assert (dense["tokens"], cpt["tokens"], moe["tokens"]) == (0, 384, 384)
    for stage, row in (("moe", moe), ("cpt", cpt)):
        figures = rows(first, stage)
        assert [figure["step"] for figure in figures] == list(range(7))
        assert [figure["tokens"] for figure in figures] == [64 * step for step in range(7)]
        # Validated before the first step, every 3 steps, and after the last.
        assert [figure["step"] for figure in figures if "val_loss" in figure] == [0, 3, 6]
        assert figures[-1]["val_loss"] == row["val_loss"]
        # Copies are exact: at step 0 the mixture is the dense model, but for rounding in fp32.
        assert figures[0]["val_loss"] == pytest.approx(dense["val_loss"], rel=1e-6)
    assert dense["total_params"] == dense["active_params"] == cpt["total_params"]
    # Two layers of 4 experts of 3 * 32 * 48 and a router of 4 * 32, in the place of one network each.
    assert moe["total_params"] - dense["total_params"] == 2 * (3 * (3 * 32 * 48) + 4 * 32)
    assert moe["active_params"] - dense["active_params"] == 2 * (1 * (3 * 32 * 48) + 4 * 32)
    assert summary(first)["exactness"]["claimed_exact"]


def test_the_load_of_every_step_is_kept(first: Path) -> None:
    found = loads(first)
    assert [(row["stage"], row["step"]) for row in found] == [("moe", step) for step in range(1, 7)]
    for row in found:
        assert row["layers"] == [0, 1]
        assert [len(load) for load in row["load"]] == [4, 4]
        assert [sum(load) for load in row["load"]] == pytest.approx([1.0, 1.0])


def test_the_export_is_a_mixtral_that_generates(first: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(first / "hf")
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
    tokenizer = AutoTokenizer.from_pretrained(first / "hf")
    prompt = tokenizer("abc", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 5
    assert summary(first)["export"]["format"] == "mixtral"


def test_the_export_is_what_the_checkpoint_holds(first: Path) -> None:
    from safetensors import safe_open

    last = first / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    with safe_open(last, "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    router = saved["global/model.model.layers.1.mlp.router.weight_ED#0"]
    exported = weights(first / "hf")
    name = next(key for key in exported if re.search(r"layers\.1\..*gate\.weight", key))
    assert torch.equal(exported[name], router)


def test_what_is_said_names_every_stage(first_run: Ended) -> None:
    for word in ("tokenizer: training", "dense: no checkpoint given", "surgery: copy", "export: mixtral"):
        assert word in first_run.out
    for label in ("Dense (start)", "Dense, continued (CPT)", "Upcycled (MoE)", "report:", "model:"):
        assert label in first_run.out
    assert first_run.err == ""


def test_progress_lines_show_what_is_looked_for(first_run: Ended) -> None:
    lines = [line for line in first_run.out.splitlines() if " moe 2/6  " in line]
    # The dense model is continued after it.
    pattern = (
        r"\d\d:\d\d:\d\d moe 2/6  loss \d\.\d+  lr \d.*  grad \d.*  [\d,]+ tok/s  mfu \d+\.\d%  "
        r"maxvio \d\.\d+  mem \d\.\d+ GiB  eta \d+:\d\d, run ~\d+:\d\d"
    )
    assert len(lines) == 1 and re.fullmatch(pattern, lines[0]), lines
    (last,) = [line for line in first_run.out.splitlines() if " moe 6/6  " in line]
    assert "eta" not in last
    # A dense leg has no experts whose load could be shown.
    assert not [line for line in first_run.out.splitlines() if " cpt " in line and "maxvio" in line]


def test_utilisation_is_the_flops_done_over_those_possible(first: Path) -> None:
    said = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    costs = {row["model"]: row["flops_per_token_train"] for row in summary(first)["results"]}
    for stage in ("moe", "cpt"):
        figures = [row for row in said if row["stage"] == stage and row["step"] > 0]
        peaks = [costs[stage] * row["tokens_per_s"] / row["mfu"] for row in figures]
        assert peaks == pytest.approx([peaks[0]] * len(peaks))
        assert all(row["tokens_per_s"] == pytest.approx(64 / row["step_s"]) for row in figures)


def test_the_second_run_uses_what_the_first_has_cached(workplace: Path, text: str, first: Path) -> None:
    ended = job(workplace, {"data.path": text, "run.name": "second"})
    assert ended.code == 0, ended.err
    assert "dense: using the default model cached" in ended.out
    assert "using the tokens cached" in ended.out
    assert "tokenizer: training" not in ended.out
    second = workplace / "outputs" / "second"
    assert rows(second, "dense") == []
    assert rows(second, "moe") == rows(first, "moe")
    assert rows(second, "cpt") == rows(first, "cpt")


def test_the_default_does_not_depend_on_the_optimizer_of_the_run(
    tmp_path: Path, text: str, first: Path
) -> None:
    # Its place in the cache does not either: another optimizer must not find another default there.
    changes = {"optim.name": "muon", "optim.weight_decay": 0.5, "optim.clip_norm": 0.01}
    stopped = job(tmp_path, {"data.path": text, "run.name": "muon"} | changes, StopAt("dense", 2))
    assert stopped.code == 130
    assert rows(tmp_path / "outputs" / "muon", "dense") == rows(first, "dense")[:4]


def test_the_mixture_and_its_baseline_see_samples_that_the_default_has_not(tmp_path: Path, text: str) -> None:
    taken: list[int] = []
    original = PackedDataset.batch

    def batch(self: PackedDataset, first: int, count: int) -> Any:
        if not isinstance(self, OrderedDataset):
            taken.extend(range(first, first + count))
        return original(self, first, count)

    with patch.object(PackedDataset, "batch", batch):
        assert job(tmp_path, {"data.path": text}).code == 0
    # 4 steps of 4 samples for the default, then the same 6 steps of 4 for the mixture and for the baseline.
    assert taken == list(range(16)) + 2 * list(range(16, 40))


def test_a_dense_checkpoint_of_ones_own(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    dense = make_checkpoint("llama")
    lines = write_text(tmp_path / "text", suffix="jsonl")
    options = {"dense": dense, "data.path": lines, "data.text_key": "body", "run.name": "own"}
    ended = job(tmp_path, options, full=True)
    assert ended.code == 0, ended.err
    run_dir = tmp_path / "outputs" / "own"
    # No baseline is trained unless it is asked for.
    assert [row["model"] for row in summary(run_dir)["results"]] == ["dense", "moe"]
    assert not (run_dir / "cpt").exists()
    assert rows(run_dir, "dense") == [] and rows(run_dir, "cpt") == []
    assert summary(run_dir)["export"]["native"]
    # Nothing of the dense checkpoint is touched, and its tokenizer comes along.
    assert (run_dir / "hf" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert (run_dir / "report.html").is_file()


def test_a_host_without_a_native_form_is_exported_in_grafts_own(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "dense": make_checkpoint("starcoder2", dtype="bfloat16"),
        "data.path": write_text(tmp_path / "text"),
        "run.name": "star",
        "compare.cpt": True,
        "engine.strategy": "ddp",
        "train.micro_batch_size": 2,
        "upcycle.layers": "[1]",
    }
    ended = job(tmp_path, options)
    assert ended.code == 0, ended.err
    assert "export: in Graft's own format, since" in ended.out
    run_dir = tmp_path / "outputs" / "star"
    assert [row["model"] for row in summary(run_dir)["results"]] == ["dense", "cpt", "moe"]
    assert summary(run_dir)["export"]["format"] == "graft"
    assert loads(run_dir)[0]["layers"] == [1]
    # As in the dense checkpoint, but for the routers.
    for name, tensor in weights(run_dir / "hf").items():
        assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name

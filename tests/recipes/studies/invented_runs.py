"""Run folders as the job leaves them, with numbers chosen by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.studies.upcycle_vs_cpt.arms_trials import ArmsTrial, plan_trials

# A step is 10 tokens; a token of the dense model costs 2 FLOPs, of the mixture 3.
STEP, DENSE, MOE = 10, 2.0, 3.0
STEPS = 20
LENGTHS = (30, 60)
SERVING = {
    "dense": [
        {"batch": b, "length": 4, "bytes_per_token": 2e6 / b, "weight_bytes_per_token": 1e6 / b,
         "flops_per_token": 2e6, "distinct_experts": None, "distinct_source": None}
        for b in (1, 32)
    ],
    "moe": [
        {"batch": b, "length": 4, "bytes_per_token": 3e6 / b**0.5, "weight_bytes_per_token": 2e6 / b,
         "flops_per_token": 3e6, "distinct_experts": min(2.0 * b, 8.0), "distinct_source": "traced"}
        for b in (1, 32)
    ],
}  # fmt: skip


def row(model: str, loss: float, steps: int, flops: float) -> dict[str, Any]:
    """Returns a row of ``summary.json``."""
    params = {"total_params": 100, "active_params": 100} if flops == DENSE else {}
    return {
        "model": model,
        "val_loss": loss,
        "tokens": steps * STEP,
        "flops_per_token_train": flops,
        "total_params": 400,
        "active_params": 150,
    } | params


def finish(trial: ArmsTrial, rows: list[dict[str, Any]]) -> None:
    """Writes what a run that came to its end leaves; losses fall from 9 in a straight line."""
    trial.folder.mkdir(parents=True)
    summary: Mapping[str, Any] = {
        "results": rows,
        "serving": SERVING,
        "moe": {"num_experts": 8, "top_k": 2},
        "tokens_per_step": STEP,
    }
    (trial.folder / "summary.json").write_text(json.dumps(summary))
    lines = []
    for stage in rows:
        last = stage["tokens"] // STEP
        for step in range(0, last + 1, 2):
            share = step / last if last else 0.0
            loss = 9.0 + share * (stage["val_loss"] - 9.0)
            line = {"stage": stage["model"], "step": step, "tokens": step * STEP, "val_loss": loss}
            lines.append(line | ({"lr": 1.0 if step <= 0.8 * last else 0.5} if step else {}))
        if last % 2:
            lines.append(lines[-1] | {"step": last, "tokens": last * STEP, "val_loss": stage["val_loss"]})
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def finish_all(trials: list[ArmsTrial]) -> None:
    """Losses that are known by hand: seed s adds s, the longer dense model takes 1 off."""
    for trial in trials:
        if trial.arms == "scratch":
            rows = [
                row("scratch", 4.5 + trial.seed, STEPS + 40, MOE),
                row("scratch_0", 5.5 + trial.seed, STEPS, MOE),
                row("scratch_30", 5.0 + trial.seed, STEPS + 20, MOE),
            ]
        else:
            base = trial.seed - (trial.lengths == (60,))
            rows = [
                row("dense", 6.0 + base, 0, DENSE),
                row("cpt", 4.25 + base, 30, DENSE),
                # Seed by seed 0.25 and 0.75 behind.
                row("cpt_tokens", 4.75 + base + 0.5 * trial.seed, STEPS, DENSE),
                row("moe", 4.5 + base, STEPS, MOE),
            ]
        finish(trial, rows)


def grid(folder: Path, seeds: int = 2) -> list[ArmsTrial]:
    """A finished grid."""
    trials = plan_trials(folder, LENGTHS, seeds)
    finish_all(trials)
    return trials

"""LLaMA-MoE v2 with outputs that vary as much as the dense network's.

Letters: D model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recipes.upcycling.sharded.align import output_gain
from tests.recipes.jobs.job_runs import Ended, job, process, summary

OPTIONS = {
    "upcycle": "llama_moe_v2",
    "upcycle.num_experts": 3,
    "upcycle.layers": "all",
    "upcycle.cluster_tokens": 64,
    "calibration.samples": 8,
    "router.top_k": 1,
    "router.renormalise": "false",
    "compare.cpt": "false",
    "train.steps": 0,
    "optim.schedule.warmup_steps": 0,
}


@pytest.fixture(scope="module")
def runs(workplace: Path, text: str, first: Path) -> dict[bool, Path]:
    """Without and with it; nothing is trained."""
    done = {}
    for aligned in (False, True):
        name = f"aligned-{aligned}"
        options = OPTIONS | {"data.path": text, "run.name": name, "upcycle.align_outputs": aligned}
        ended = job(workplace, options)
        assert ended.code == 0, ended.err
        done[aligned] = workplace / "outputs" / name
    return done


def drifts(run: Path) -> list[dict[str, Any]]:
    return summary(run)["exactness"]["layers"]


def test_a_gain_by_hand() -> None:
    dense_TD = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]])
    out_TD = torch.tensor([[0.0, 1.0, 5.0], [0.5, 2.0, 5.0]])
    # Deviations are in the ratio 2 to 0.5; a channel that does not vary on either side is left alone.
    assert output_gain(dense_TD, out_TD).tolist() == [4.0, 1.0, 1.0]


def test_only_down_projections_change_and_by_one_factor_a_channel(runs: dict[bool, Path]) -> None:
    plain, aligned = (load_file(runs[key] / "hf" / "model.safetensors") for key in (False, True))
    changed = {name for name in plain if not torch.equal(plain[name], aligned[name])}
    downs = {name for name in plain if ".down." in name}
    assert changed == downs and downs
    layer = [name for name in sorted(downs) if ".layers.0." in name]
    gains = [(aligned[name].float() / plain[name].float()).nanmedian(dim=1).values for name in layer]
    for gain_D in gains[1:]:
        torch.testing.assert_close(gain_D, gains[0], rtol=2e-2, atol=0)


def test_the_norm_of_the_outputs_comes_nearer(runs: dict[bool, Path]) -> None:
    for before, after in zip(drifts(runs[False]), drifts(runs[True]), strict=True):
        assert abs(after["gain"] - 1) < abs(before["gain"] - 1)


def test_two_ranks_align_as_one(workplace: Path, text: str, runs: dict[bool, Path]) -> None:
    options = OPTIONS | {"data.path": text, "run.name": "aligned-ranks", "upcycle.align_outputs": True}
    ended: Ended = process(workplace, options, ranks=2)
    assert ended.code == 0, ended.err
    one = load_file(runs[True] / "hf" / "model.safetensors")
    two = load_file(workplace / "outputs" / "aligned-ranks" / "hf" / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-4)


def test_experts_of_attention_do_not_change_it(workplace: Path, text: str, runs: dict[bool, Path]) -> None:
    options = OPTIONS | {"data.path": text, "run.name": "aligned-heads", "upcycle.align_outputs": True}
    ended = job(workplace, options | {"attention": "moe"})
    assert ended.code == 0, ended.err
    assert drifts(workplace / "outputs" / "aligned-heads") == drifts(runs[True])

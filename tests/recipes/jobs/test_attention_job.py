"""The main job with attention experts: trained, reported, resumed, exported; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe.accounting.bytes import weight_bytes
from moe.accounting.flops import flops_from_shape
from moe.accounting.params import count_from_shape, count_parameters
from moe.accounting.shape import shape_from_config
from moe.attention.routed_attention import attention_layers
from recipes.cap.hooks import ExpertTrace, check_sites, find_sites
from recipes.models.export.graft_format import load_graft
from tests.recipes.jobs.job_runs import StopAt, job, rows, same_training, summary

ATTENTION = {
    "attention": "moe",
    "attention.router.top_k": 1,
    "upcycle.layers": "last:1",
    "compare.cpt": "false",
}


@pytest.fixture(scope="module")
def run(workplace: Path, text: str, first: Path) -> Path:
    """Uninterrupted; on the default that the first run has trained."""
    ended = job(workplace, ATTENTION | {"data.path": text, "run.name": "attention"}, full=True)
    assert ended.code == 0, ended.err
    assert "attention: 1 of 2 key-value heads per token in layers [0, 1], weights times 1" in ended.out
    assert "export: in Graft's own format" in ended.out and "has no attention experts" in ended.out
    return workplace / "outputs" / "attention"


def test_it_reports_both_kinds_of_routers(run: Path) -> None:
    last = rows(run, "moe")[-1]
    assert last["attention/router/experts_per_token"] == 1 and last["router/experts_per_token"] == 2
    for name in ("maxvio", "balance_loss", "entropy"):
        assert {f"layer/00/attention/{name}", f"layer/01/attention/{name}", f"layer/01/{name}"} <= set(last)
    assert "layer/00/maxvio" not in last
    # Which keys a query meets depends on the text: of the FLOPs these are expected ones.
    assert last["flops_per_token"] == last["flops_per_token_used"] > 0
    found = summary(run)
    assert found["attention"]["layers"] == [0, 1] and not found["attention"]["claimed_exact"]
    assert found["exactness"]["claimed_exact"]
    (moe,) = [row for row in found["results"] if row["model"] == "moe"]
    shape = shape_from_config(json.loads((run / "hf" / "config.json").read_text()))
    assert moe["flops_per_token_forward"] == flops_from_shape(shape, 16).forward
    assert found["export"]["format"] == "graft" and found["export"]["max_diff"] < 1e-5
    assert json.loads((run / "hf" / "config.json").read_text())["attention_layers"][1]["index"] == 1


def test_its_export_is_counted_as_the_model_it_is(run: Path) -> None:
    model = load_graft(run / "hf").module
    shape = shape_from_config(json.loads((run / "hf" / "config.json").read_text()))
    assert count_from_shape(shape) == count_parameters(model)
    assert weight_bytes(shape) == 2 * count_parameters(model).total


def test_its_heads_are_watched(run: Path) -> None:
    model = load_graft(run / "hf").module
    shape = shape_from_config(json.loads((run / "hf" / "config.json").read_text()))
    sites = find_sites(model)
    check_sites(sites, shape, "FOLDER")
    assert [site.kind for site in sites] == ["plan", "routing", "routing"]
    seen: list[set[int]] = []
    for _, layer in attention_layers(model):
        layer.router.register_forward_hook(
            lambda module, args, output: seen.append(set(output.expert_ids_TK.flatten().tolist()))
        )
    with torch.no_grad(), ExpertTrace(sites, 1, torch.device("cpu")) as trace:
        trace.next_pass()
        model(torch.arange(5)[None])
    assert trace.distinct()[0].per_layer[1:] == tuple(float(len(used)) for used in seen)


def test_a_resumed_run_computes_the_same(workplace: Path, text: str, run: Path) -> None:
    options = ATTENTION | {"data.path": text, "run.name": "attention-stopped"}
    assert job(workplace, options, StopAt("moe", 3)).code == 130
    stopped = workplace / "outputs" / "attention-stopped"
    refused = job(
        workplace, options | {"resume": str(stopped), "run.name": None, "attention.router.top_k": 2}
    )
    assert refused.code == 2 and "attention.router" in refused.err
    assert job(workplace, options | {"resume": str(stopped), "run.name": None}).code == 0
    same_training(stopped, run, stages=("moe",))


def test_all_heads_pass_the_gate(workplace: Path, text: str) -> None:
    options = ATTENTION | {"data.path": text, "run.name": "attention-exact", "train.steps": 0}
    ended = job(workplace, options | {"attention.router.top_k": 2, "optim.schedule.warmup_steps": 0})
    assert ended.code == 0, ended.err
    found = summary(workplace / "outputs" / "attention-exact")["attention"]
    assert found["claimed_exact"] and found["logits"]["max_diff"] < 1e-4 * found["logits"]["max_logit"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention.router.top_k": 3}, "attention.router.top_k=3: the model has 2 key-value heads"),
        (
            {"router@attention.router": "soft_moe", "attention.router.top_k": None},
            "attention.router.name",
        ),
        ({"attention.layers": "[7]"}, "attention.layers=[7]: layers [7] do not exist"),
        ({"attention.scale_factor": -1}, "attention.scale_factor=-1.0"),
        ({"attention": "none"}, "there is no such option"),
    ],
)
def test_mistakes_are_told_at_once(workplace: Path, text: str, changes: dict[str, object], said: str) -> None:
    ended = job(workplace, ATTENTION | {"data.path": text, "run.name": "never"} | changes)
    assert ended.code == 2 and said in ended.err, ended.err
    assert not (workplace / "outputs" / "never").exists()

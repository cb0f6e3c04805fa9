"""`python -m tools.cap` from folders to files: keys, counts, null with reasons, comparison, overhead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.accounting.passes import decode_batch
from moe.accounting.utilisation import Machine
from moe.errors import ConfigError, ModelError
from recipes.cap.cost import Prices, find_rates
from recipes.cap.decode import roll_out
from recipes.cap.measure import Workload, measure_overhead, measure_point
from recipes.cap.phases import PHASE_KEYS
from tests.conftest import MakeCheckpoint
from tests.recipes.cap.cap_systems import MIXTURES, graft_moe, load, some_ids
from tools.cap import main

QUICK = ["--batch-sizes", "1,3", "--prompt", "6", "--new", "3", "--rounds", "2", "--threads", "1"]
TIERS = ("--tier", "dram=1000", "--tier", "disk=10:experts=0.5")
PEAKS = ["--peak-bandwidth", "1000", "--peak-flops", "10000"]
POINT_KEYS = {
    "batch_size",
    "prompt",
    "new",
    "rounds",
    "reason",
    "reached_batch_size",
    "ttft_s",
    "tpot_s",
    "request_s",
    "tokens_per_s",
    "prefill",
    "decode",
    "cache",
    "memory",
    "energy",
    "cost",
    "efficientllm",
}
SYSTEM_KEYS = {
    "name",
    "folder",
    "model_type",
    "parameters",
    "active_parameters",
    "mixtures",
    "experts",
    "top_k",
    "dtype",
    "bits",
    "weights",
    "experts_implementation",
    "accounting_reason",
    "devices",
    "peaks",
    "points",
    "overhead",
    "accuracy",
    "efficientllm",
}


@pytest.fixture(autouse=True)
def same_threads(one_thread: None) -> None:
    """``--threads`` holds for one test."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return str(path)


@pytest.fixture(scope="module")
def written(make_checkpoint: MakeCheckpoint, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a dense model, two MoEs of transformers and one of Graft's own, with everything."""
    out = tmp_path_factory.mktemp("cap")
    folders = [f"{name}={make_checkpoint(name, **MIXTURES[name])}" for name in ("qwen3_moe", "deepseek_v3")]
    folders.append(f"graft={graft_moe(make_checkpoint, out / 'graft')}")
    questions = out / "q.jsonl"
    rows = [{"question": "the quick brown", "choices": ["fox", "x"], "answer": i % 2} for i in range(4)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = out / "answers.jsonl"
    prompts.write_text(json.dumps({"prompt": "the quick brown", "answer": "fox"}) + "\n")
    answers = ["--answers", str(prompts), "--answer-tokens", "2"]
    more = ["--text", text, "--perplexity", "2", "--perplexity-length", "8", "--choices", str(questions)]
    cost = ["--price-usd", "1000", "--power-watts", "50"]
    dense = f"dense={make_checkpoint('llama')}"
    threads = torch.get_num_threads()
    assert (
        main([dense, *folders, *QUICK, *PEAKS, *TIERS, *more, *answers, *cost, "--out", str(out / "out")])
        == 0
    )
    torch.set_num_threads(threads)
    return out / "out"


@pytest.fixture(scope="module")
def report(written: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((written / "cap.json").read_text())
    return content


def test_the_keys_of_the_schema(report: dict[str, Any]) -> None:
    assert (report["schema"], report["schema_version"]) == ("graft.cap", 1)
    assert report.keys() == {
        "schema",
        "schema_version",
        "created",
        "environment",
        "workload",
        "cost_assumptions",
        "systems",
    }
    for system in report["systems"]:
        assert system.keys() == SYSTEM_KEYS
        for point in system["points"]:
            assert point.keys() == POINT_KEYS
            assert point["decode"].keys() == point["prefill"].keys() == set(PHASE_KEYS)


def test_every_system_has_its_figures(report: dict[str, Any]) -> None:
    assert [s["name"] for s in report["systems"]] == ["dense", "qwen3_moe", "deepseek_v3", "graft"]
    assert [s["mixtures"] for s in report["systems"]] == [0, 1, 2, 3]
    for system in report["systems"]:
        assert system["weights"]["held_bytes"] == system["weights"]["counted_bytes"] > 0
        for point, size in zip(system["points"], (1, 3), strict=True):
            assert point["batch_size"] == point["reached_batch_size"] == size and point["reason"] is None
            assert point["cache"]["held_bytes"] > 0 and point["cost"]["usd_per_mtok"] > 0
            assert point["decode"]["passes"] == 2 * 2 and point["prefill"]["passes"] == 2
            for phase in ("prefill", "decode"):
                assert 0 < point[phase]["s_mbu"] <= point[phase]["mbu"]
                assert 0 < point[phase]["s_mfu"] <= point[phase]["mfu"]
        assert system["accuracy"]["perplexity"]["perplexity"] > 1
        assert system["accuracy"]["choices"]["questions"] == 4
        assert system["accuracy"]["answers"]["prompts"] == 1
        decode = system["points"][0]["decode"]
        fast, slow = decode["tiers"]
        assert fast["bytes"] + slow["bytes"] == pytest.approx(decode["bytes"]["complete"])
        assert slow["bytes"] == pytest.approx(0.5 * decode["bytes"]["experts"])
        assert slow["utilisation"] == pytest.approx(slow["bytes"] / decode["seconds"] / 1e10)
        assert system["peaks"]["bytes_per_s"] == {
            "value": 1e12,
            "source": "user",
            "detail": "given by the user",
            "median": None,
        }


def test_utilisation_is_bytes_over_time(report: dict[str, Any]) -> None:
    for system in report["systems"]:
        for point in system["points"]:
            decode = point["decode"]
            assert decode["s_mbu"] == pytest.approx(decode["bytes"]["complete"] / decode["seconds"] / 1e12)
            assert decode["s_mfu"] == pytest.approx(decode["flops"] / decode["seconds"] / 1e13)
            assert point["tokens_per_s"] == pytest.approx(
                2 * 3 * point["batch_size"] / (decode["seconds"] + point["prefill"]["seconds"])
            )


def test_what_the_machine_does_not_tell_is_null_with_a_reason(report: dict[str, Any]) -> None:
    for system in report["systems"]:
        for point in system["points"]:
            if point["energy"]["joules"] is None:
                assert point["energy"]["detail"] and point["efficientllm"]["reasons"]["aec_watts"]
            else:
                assert point["energy"]["joules"] > 0
            assert point["efficientllm"]["tt"] is None and point["efficientllm"]["al_s"] > 0
    dense, *moe_blocks = report["systems"]
    assert dense["points"][0]["decode"]["distinct"] is None
    assert all(system["points"][0]["decode"]["distinct"]["source"] == "traced" for system in moe_blocks)


def test_the_files(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == {"cap.json", "cap.html", "curves.png", "radar.png"}
    page = (written / "cap.html").read_text()
    for part in ("deepseek_v3", "S-MBU", "EfficientLLM", "arXiv 2505.13840", "given by the user"):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page


@pytest.mark.usefixtures("rendered")
def test_comparison(written: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = json.loads((written / "cap.json").read_text())
    other["systems"] = other["systems"][1:2]
    other["environment"]["device"] = "another"
    other["systems"][0]["points"][0]["tpot_s"]["mean"] *= 2
    (tmp_path / "b.json").write_text(json.dumps(other))
    options = ["--out", str(tmp_path / "out"), "--radar", "min-max", "--json", str(tmp_path / "joint.json")]
    assert main(["--compare", str(written / "cap.json"), str(tmp_path / "b.json"), *options]) == 0
    out = capsys.readouterr().out
    assert "note: device differs: CPU" in out and "qwen3_moe (cap)" in out and "qwen3_moe (b)" in out
    joint = json.loads((tmp_path / "joint.json").read_text())
    assert [system["name"] for system in joint["systems"]][-1] == "qwen3_moe (b)"
    assert (tmp_path / "out" / "radar.png").stat().st_size > 10_000


def test_ratios_are_against_the_first_system(report: dict[str, Any]) -> None:
    from recipes.cap.join_reports import ratio_rows

    rows = ratio_rows(report)
    assert [row[3] for row in rows[:2]] == ["1.000", "1.000"]
    first, other = report["systems"][0]["points"][1], report["systems"][2]["points"][1]
    assert rows[5][3] == f"{other['tpot_s']['mean'] / first['tpot_s']['mean']:.3f}"
    missing = json.loads(json.dumps(report))
    missing["systems"][0]["points"] = missing["systems"][0]["points"][1:]
    assert ratio_rows(missing)[1][3] == "-", "no base at this batch size"


def test_reports_that_cannot_be_compared(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"schema": "graft.cap", "schema_version": 99}')
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ConfigError) as error:
        main(["--compare", *(str(tmp_path / f"{name}.json") for name in "abc"), str(tmp_path / "none")])
    rules = [m.rule for m in error.value.mistakes]
    assert len(rules) == 4 and "graft.cap 99; graft.cap 1 is known here" in rules[1]


def test_json_on_stdout_is_alone_there(
    make_checkpoint: MakeCheckpoint, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make_checkpoint("llama"))
    assert main([folder, *QUICK, "--text", text, "--peaks", "table", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    (system,) = json.loads(out)["systems"]
    assert system["points"][0]["decode"]["s_mbu"] is None
    assert system["points"][0]["decode"]["utilisation_reason"] == "the peak bandwidth and FLOP/s is not known"
    assert (
        system["peaks"]["flops"]["source"] is None and "does not know" in system["peaks"]["flops"]["detail"]
    )
    assert "TPOT" in err and "utilisation is missing" in err and "cost is missing" in err


def test_a_family_that_nobody_counts_is_measured_all_the_same(
    make_checkpoint: MakeCheckpoint, text: str, tmp_path: Path
) -> None:
    folder = str(make_checkpoint("stablelm"))
    assert main([folder, *QUICK, *PEAKS, "--text", text, "--json", str(tmp_path / "a.json")]) == 0
    (system,) = json.loads((tmp_path / "a.json").read_text())["systems"]
    point = system["points"][1]
    assert point["tpot_s"]["mean"] > 0 and point["decode"]["s_mbu"] is point["decode"]["s_mfu"] is None
    assert "no accounting knows the family 'stablelm'" in point["decode"]["utilisation_reason"]


def test_the_cache_that_is_counted_is_the_one_that_is_held(make_checkpoint: MakeCheckpoint) -> None:
    for family in ("llama", "mixtral"):
        system = load(make_checkpoint(family, **MIXTURES.get(family, {})))
        run = roll_out(system.model, some_ids(2, 5), 3)
        # 3 layers of 2 heads of 8, keys and values, fp32; the last token is not run
        assert run.cache_bytes == 3 * 2 * 2 * 8 * 4 * 2 * 7 and run.cache_length == 7


def test_a_batch_that_is_not_reached_is_refused(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = load(make_checkpoint("llama"))
    real = roll_out

    def smaller(model: Any, prompt_BS: torch.Tensor, new: int, sites: Any = None) -> Any:
        return replace(real(model, prompt_BS, new, sites), sequences=(1,) * new)

    monkeypatch.setattr("recipes.cap.measure.roll_out", smaller)
    with pytest.raises(ModelError, match=r"--batch-sizes=3: passes ran with batches of \[1\]"):
        measure_point(system, some_ids(3, 5), QUICK_WORK, Machine(1.0, 1.0), find_rates("x", Prices()))


QUICK_WORK = Workload((3,), 5, 3, 1)


def test_memory_that_runs_out_is_a_point_without_values(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("recipes.cap.measure.roll_out", full)
    system = load(make_checkpoint("llama"))
    point = measure_point(system, some_ids(3, 5), QUICK_WORK, Machine(1.0, 1.0), find_rates("x", Prices()))
    assert point.keys() == POINT_KEYS and point["reason"] == "out of memory"
    assert point["tpot_s"] is point["decode"]["s_mbu"] is point["reached_batch_size"] is None


def test_products_that_refuse_a_width_name_the_way_out(make_checkpoint: MakeCheckpoint) -> None:
    odd = {**MIXTURES["qwen3_moe"], "moe_intermediate_size": 18}  # 72 bytes: no multiple of 16
    system = load(make_checkpoint("qwen3_moe", **odd))
    with pytest.raises(ModelError, match=r"--backend='grouped_mm'.*Give --backend eager"):
        measure_point(system, some_ids(3, 5), QUICK_WORK, Machine(1.0, 1.0), find_rates("x", Prices()))
    system = load(make_checkpoint("qwen3_moe", **odd), experts="eager")
    point = measure_point(system, some_ids(3, 5), QUICK_WORK, Machine(1e12, 1e12), find_rates("x", Prices()))
    assert point["decode"]["s_mbu"] > 0


def test_overhead_is_of_both_ways(make_checkpoint: MakeCheckpoint) -> None:
    system = load(make_checkpoint("mixtral", **MIXTURES["mixtral"]))
    found = measure_overhead(system, some_ids(1, 5), 3, 2)
    assert found is not None and found["ratio"]["p10"] <= found["ratio"]["median"] <= found["ratio"]["p90"]
    assert found["tpot_with_s"] > 0 < found["tpot_without_s"]
    assert measure_overhead(load(make_checkpoint("llama")), some_ids(1, 5), 3, 2) is None


def test_a_longer_decode_reads_more_of_the_cache(make_checkpoint: MakeCheckpoint) -> None:
    system = load(make_checkpoint("llama"))
    work = Workload((1,), 5, 4, 1)
    point = measure_point(system, some_ids(1, 5), work, Machine(1e12, 1e12), find_rates("x", Prices()))
    # passes now of 6, 7 and 8 tokens; a token holds 3 layers * 2 * 2 * 8 fp32
    assert point["decode"]["bytes"]["kv_read"] == (6 + 7 + 8) * 3 * 32 * 4
    assert point["decode"]["bytes"]["kv_written"] == 3 * 3 * 32 * 4
    assert decode_batch(1, 6).tokens == 1

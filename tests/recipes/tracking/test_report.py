"""The report of a run: complete, unfinished, damaged, huge; and what it says in words."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.errors import DataError
from recipes.tracking.metrics_log import MetricsLog
from recipes.tracking.report import build_report, formats, readme_figure, results_table
from recipes.tracking.report.canvas import spread
from recipes.tracking.report.certificates import read_certificates
from recipes.tracking.report.colours import LIGHT
from recipes.tracking.report.heatmap import load_figure, pick_evenly
from recipes.tracking.report.loss_figures import balance_figure, loss_figure
from recipes.tracking.report.results_table import different_tokens, headline, missing, read_results
from recipes.tracking.report.run_record import LayerLoad, read_run, series
from tests.forked_commands import run_module
from tests.grid import each
from tools.report import main

PNG = b"\x89PNG\r\n\x1a\n"
SUMMARY: dict[str, Any] = {
    "run": {"name": "demo <b>&", "recipe": "upcycle", "started": 1.7e9, "seconds": 125.0},
    "results": [
        {
            "model": "moe",
            "label": "Upcycled <MoE>",
            "val_loss": 3.2,
            "tokens": 81_920,
            "total_params": 31.4e6,
            "active_params": 13.1e6,
            "flops_per_token_forward": 2.7e7,
            "flops_per_token_train": 8.1e7,
            "tokens_per_s": 20_100.0,
        },
        {
            "model": "dense",
            "label": "Dense (start)",
            "val_loss": 3.5,
            "tokens": 0,
            "total_params": 10.2e6,
            "active_params": 10.2e6,
            "flops_per_token_forward": 2.1e7,
            "flops_per_token_train": 6.2e7,
        },
        {"model": "cpt", "label": "Dense, continued", "val_loss": 3.3, "tokens": 81_920},
    ],
    "exactness": {"method": "copy", "claimed_exact": True, "max_logit_diff": 3e-6, "relative": 2.5e-7},
    "export": {"format": "mixtral", "path": "hf", "relative": 1.1e-7},
    "timings": {"first_step_s": 2.31, "moe_s": 61.0},
    "peak_memory_bytes": 1.5 * 2**30,
    "machine": {"device": "cpu", "gpus": None, "versions": {"torch": "2.13.0"}},
}


def _rows(stage: str, steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"stage": stage, "step": 0, "val_loss": 3.6}]
    for step in range(1, steps + 1):
        row = {"stage": stage, "step": step, "tokens": 8192 * step, "loss": 3.5 - step / 50, "mfu": 0.25}
        row["tokens_per_s"] = 20_000.0
        if step % 5 == 0:
            row["val_loss"] = 3.5 - step / 40
        if stage == "moe":
            row |= {"router/maxvio": 1 / step, "router/load_cv": 0.5 / step, "router/entropy": 0.9}
            row |= {f"layer/{layer:02d}/maxvio": (1 + layer / 10) / step for layer in range(3)}
        rows.append(row)
    return rows


def _make(
    run_dir: Path, summary: dict[str, Any] | None = None, stages: tuple[str, ...] = ("moe", "cpt")
) -> Path:
    """A run directory as a run of 10 steps leaves it."""
    log = MetricsLog(run_dir / "metrics.jsonl")
    for stage in stages:
        for row in _rows(stage, 10):
            log.append(row)
    log.close()
    if "moe" in stages:
        loads = MetricsLog(run_dir / "load.jsonl")
        generator = np.random.default_rng(0)
        for step in range(1, 11):
            load = generator.dirichlet(np.ones(8), size=3)
            loads.append({"stage": "moe", "step": step, "layers": [0, 1, 2], "load": load})
        loads.close()
    (run_dir / "config.yaml").write_text("run:\n  name: '<script>alert(1)</script>'\n")
    if summary is not None:
        (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


class _Page(HTMLParser):
    """What a browser would see: text, addresses it would load, elements left open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "srcset", "href", "data", "action")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.usefixtures("rendered")
def test_a_complete_run_is_one_page_that_loads_nothing(tmp_path: Path) -> None:
    path = build_report(_make(tmp_path / "run", SUMMARY))
    page = _Page(path)
    assert path == tmp_path / "run" / "report.html" and not page.open
    assert page.addresses and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    raw = path.read_text()
    assert not re.search(r"https?://|url\(|@import", raw) and "script" not in page.tags
    for text in (
        "3.2000",
        "31.4 M",
        "0.0270",
        "1 min 01 s",
        "1.50 GiB",
        "torch 2.13.0",
        "2.5e-07",
        "-0.3000",
    ):
        assert text in page.text, text
    assert "AutoModelForCausalLM.from_pretrained(path)" in page.text
    assert sorted(p.name for p in (tmp_path / "run" / "figures").iterdir()) == [
        "balance.png",
        "load.png",
        "loss.png",
    ]
    assert all(p.read_bytes().startswith(PNG) for p in (tmp_path / "run" / "figures").iterdir())


def test_what_an_inexact_method_did_to_each_layer(tmp_path: Path) -> None:
    layer = {"layer": 3, "relative_error": 0.5921, "cosine": 0.8819, "gain": 0.5231, "load_entropy": None}
    exactness = {"method": "drop", "claimed_exact": False, "layers": [layer]}
    text = _Page(build_report(_make(tmp_path / "drop", SUMMARY | {"exactness": exactness}))).text
    for figure in ("relative error", "0.592", "0.882", "0.523", "does not claim to be exact"):
        assert figure in text, figure
    exact = exactness | {"claimed_exact": True}
    assert "0.592" not in _Page(build_report(_make(tmp_path / "copy", SUMMARY | {"exactness": exact}))).text


def test_what_comes_from_a_run_is_escaped(tmp_path: Path) -> None:
    raw = build_report(_make(tmp_path, SUMMARY)).read_text()
    assert "<script" not in raw and "<MoE>" not in raw and "demo <b>" not in raw
    assert "demo &lt;b&gt;&amp;" in raw and "&lt;script&gt;alert(1)" in raw


@pytest.mark.parametrize("gone", ["run", "results", "exactness", "export", "timings", "machine"])
def test_any_part_of_the_summary_may_be_missing_or_wrong(tmp_path: Path, gone: str) -> None:
    for value in (None, [], "text", {"a": None}):
        (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | {gone: value}))
        page = _Page(build_report(tmp_path))
        assert not page.open and "None" not in page.text and "nan" not in page.text.lower().split()


@each(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list instead of a JSON object"),
        ("{}", "holds something else than graft certify writes"),
        ('{"results": [7]}', "holds something else than graft certify writes"),
        ('{"results": [{"name": "vllm", "greedy": 3}]}', "holds something else than graft certify writes"),
    ],
)
def test_damaged_certificates_are_told(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "certificate.json").write_text(content)
    rows, fault = read_certificates(tmp_path)
    assert rows == [] and fault is not None and said in fault
    assert read_certificates(tmp_path / "none") == ([], None)


def test_a_damaged_certificate_is_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "certificate.json").write_text("{")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    text = _Page(build_report(tmp_path)).text
    assert "Certificates" in text and "certificate.json is not JSON" in text and "graft certify" in text


def test_a_run_without_a_summary_says_so(tmp_path: Path) -> None:
    page = _Page(build_report(_make(tmp_path)))
    assert "Not measured in this run" in page.text and "summary.json: the run has not come" in page.text
    assert "This run has exported no model." in page.text and "The drift of the logits was not" in page.text


@pytest.mark.usefixtures("rendered")
def test_a_run_stopped_in_its_dense_stage_shows_that_curve(tmp_path: Path) -> None:
    record = read_run(_make(tmp_path, stages=("dense",)))
    figure = loss_figure(record, LIGHT)
    assert figure is not None and figure.axes[0].get_xlabel() == "training tokens"
    assert balance_figure(record, LIGHT) is None and load_figure(record.loads, LIGHT) is None
    assert "Dense (its own training)" in _Page(build_report(tmp_path)).text


def test_a_summary_alone_is_reported(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    page = _Page(build_report(tmp_path))
    assert "3.2000" in page.text and not (tmp_path / "figures").exists()


@pytest.mark.usefixtures("rendered")
def test_a_run_that_diverged_is_reported(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        nan = math.nan
        log.append(
            {"stage": "moe", "step": step, "tokens": step, "loss": nan, "val_loss": nan, "router/maxvio": nan}
        )
    log.close()
    MetricsLog(tmp_path / "load.jsonl").append(
        {"stage": "moe", "step": 1, "layers": [0], "load": [[math.nan] * 4]}
    )
    assert build_report(tmp_path).is_file()


def test_nothing_to_report_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        build_report(tmp_path / "none")
    with pytest.raises(DataError, match="neither metrics.jsonl with a row nor summary.json"):
        build_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        build_report(tmp_path)


def test_the_loss_figure_labels_every_line(tmp_path: Path) -> None:
    figure = loss_figure(read_run(_make(tmp_path, SUMMARY)), LIGHT)
    assert figure is not None
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["Dense, continued\n3.2500", "Upcycled <MoE>\n3.2500", "Dense (start)\n3.5000"]
    heights = sorted(text.xy[1] for text in axes.texts)
    assert min(np.diff(heights)) >= 0.13 - 1e-9
    assert axes.get_xlim() == (0, 81_920) and "nats/token" in axes.get_ylabel()


@pytest.mark.usefixtures("rendered")
def test_a_start_far_above_the_rest_leaves_the_chart_and_is_said(tmp_path: Path) -> None:
    run = _make(tmp_path, SUMMARY)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"val_loss": 11.0}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    figure = loss_figure(read_run(run), LIGHT)
    assert figure is not None and figure.axes[0].get_ylim()[1] < 5
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "Upcycled <MoE> starts at 11.0000, above the chart" in texts


def test_many_layers_are_picked_evenly_and_said() -> None:
    loads = [LayerLoad(i, np.arange(600.0), np.full((600, 300), 1 / 300)) for i in range(48)]
    figure = load_figure(loads, LIGHT)
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert len(titles) == 12 and titles[0] == "layer 0" and titles[-1] == "layer 47"
    assert figure.get_suptitle() == "12 of 48 MoE layers, evenly spaced."
    mesh = figure.axes[0].collections[0]
    assert mesh.get_array().shape == (256, 240) and np.allclose(mesh.get_array(), 1.0)
    assert mesh.norm(1.0) == 0.5  # the uniform load is the middle of the scale


@pytest.mark.usefixtures("rendered")
def test_layers_of_different_widths_and_steps_written_twice(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "load.jsonl")
    log.append({"stage": "moe", "step": 1, "layers": [1, 4], "load": [[0.5, 0.5], [0.25] * 4]})
    log.append({"stage": "moe", "step": 1, "layers": [1, 4], "load": [[1.0, 0.0], [0.25] * 4]})
    log.close()
    (tmp_path / "summary.json").write_text('{"results": []}')
    (tmp_path / "metrics.jsonl").write_text('{"stage": "moe", "step": 1}\n')
    one, four = read_run(tmp_path).loads
    assert (one.layer, four.layer) == (1, 4)
    assert one.load_SE.tolist() == [[1.0, 0.0]] and four.load_SE.shape == (1, 4)
    assert load_figure([one, four], LIGHT) is not None


@pytest.mark.parametrize(
    ("count", "most", "picked"), [(3, 12, [0, 1, 2]), (5, 3, [0, 2, 4]), (48, 2, [0, 47]), (0, 3, [])]
)
def test_pick_evenly(count: int, most: int, picked: list[int]) -> None:
    assert pick_evenly(count, most) == picked


def test_spread_keeps_order_and_distance() -> None:
    assert spread([0.5], 0.1) == [0.5]
    assert spread([0.9, 0.1], 0.1) == [0.9, 0.1]
    assert np.allclose(spread([0.5, 0.5, 0.5], 0.1), [0.4, 0.5, 0.6])
    assert np.allclose(spread([1.0, 0.99, 0.0], 0.2), [1.0, 0.8, 0.0])
    assert spread([], 0.1) == []


def test_series_takes_rows_that_have_both() -> None:
    rows = [{"step": 0, "a": 1.0}, {"tokens": 20, "a": 3.0}, {"tokens": 10, "a": 2}, {"a": 9.0}]
    rows += [{"tokens": 30, "a": None}, {"tokens": 40, "a": math.nan}, {"tokens": 20, "a": 4.0}]
    tokens, values = series(rows, "a")
    assert tokens.tolist() == [0, 10, 20] and values.tolist() == [1, 2, 4]


def test_results_table_is_aligned_text() -> None:
    lines = results_table(SUMMARY).splitlines()
    assert [line.split("  ")[0] for line in lines[3:]] == [
        "Dense (start)",
        "Dense, continued",
        "Upcycled <MoE>",
    ]
    assert len({len(line) for line in lines[2:]}) == 1
    assert lines[5].split()[2:5] == ["3.2000", "-0.3000", "81.9"]
    assert lines[4].count("not measured") == 5
    assert results_table({}) == "results: not measured"


def test_the_headline_says_only_what_is_known() -> None:
    full = headline(read_results(SUMMARY))
    assert full == (
        "The dense model (10.2 M parameters, validation loss 3.5000) became an MoE of 31.4 M "
        "parameters, 13.1 M active for a token. Its validation loss after 81.9 k tokens is 3.2000, that of "
        "the dense model trained on the same tokens 3.3000."
    )
    bare = headline(read_results({"results": [{"model": "moe"}]}))
    assert bare == "The dense model became an MoE; its validation loss was not measured."
    assert "has no results of an MoE here" in headline(read_results({"results": [{"model": "dense"}]}))
    assert "was stopped" in headline([])


def test_a_mixture_that_is_trained_on_is_not_called_dense() -> None:
    start = {"model": "mixture", "val_loss": 3.5, "total_params": 31_400_000}
    moe = {"model": "moe", "label": "MoE (continued)", "val_loss": 3.2, "tokens": 81_920}
    results = read_results({"results": [moe, start]})
    assert headline(results) == (
        "The mixture (31.4 M parameters, validation loss 3.5000) was trained on. Its validation loss after "
        "81.9 k tokens is 3.2000."
    )
    assert missing(results) == ["MoE (continued): parameters"]
    table = results_table({"results": [moe, start]})
    assert "Mixture (start)" in table and "-0.3000" in table and "start" in table.splitlines()[1]
    assert "dense" not in table.lower()


def test_unequal_token_budgets_are_said() -> None:
    results = [dict(entry) for entry in SUMMARY["results"]]
    results[2]["tokens"] = 40_960
    found = read_results({"results": results})
    assert different_tokens(found) and "trained on 41.0 k tokens 3.3000" in headline(found)
    assert "different numbers of tokens, 41.0 k and 81.9 k" in results_table({"results": results})


def test_missing_names_models_and_figures() -> None:
    assert missing(read_results({"results": [{"model": "moe", "val_loss": 3.0}]})) == [
        "Dense (start): every figure",
        "Dense, continued (CPT): every figure",
        "Upcycled (MoE): parameters",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.count(0), "0"),
        (formats.count(999), "999"),
        (formats.count(999_600), "1.00 M"),
        (formats.count(12_345), "12.3 k"),
        (formats.count(1.05e9), "1.05 B"),
        (formats.count(None), "not measured"),
        (formats.count(math.nan), "not measured"),
        (formats.count(True), "not measured"),
        (formats.size(512), "512 B"),
        (formats.size(3 * 2**30), "3.00 GiB"),
        (formats.giga(2.7e7), "0.0270"),
        (formats.giga(1.234e12), "1,234"),
        (formats.share(0.3117), "31.2 %"),
        (formats.share(0), "0 %"),
        (formats.seconds(0.84), "0.840 s"),
        (formats.seconds(59.99), "1 min 00 s"),
        (formats.seconds(7_380), "2 h 03 min"),
        (formats.difference(0.1), "+0.1000"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


def test_graft_exports_are_loaded_by_graft(tmp_path: Path) -> None:
    export = {
        "format": "graft",
        "native": False,
        "path": "hf",
        "sample": '{"prompt": "a", "text": "a b <c>"}',
    }
    raw = build_report(_make(tmp_path, SUMMARY | {"export": export})).read_text()
    assert "import load_graft" in raw and "AutoModelForCausalLM" not in raw and "a b &lt;c&gt;" in raw
    from recipes.models.export.graft_format import load_graft

    assert callable(load_graft)


def test_what_rounding_costs_stands_with_the_export(tmp_path: Path) -> None:
    survival = {"changed": 1_250_000, "survived": 0.079, "left_out": "routers are not compared"}
    cost = {
        "dtype": "bfloat16",
        "loss_trained": 3.302,
        "loss_rounded": 3.478,
        "kl": 1.5e-3,
        "survival": survival,
    }
    page = build_report(
        _make(tmp_path / "bf16", SUMMARY | {"export": {"format": "mixtral", "rounding": cost}})
    )
    text = page.read_text()
    assert "7.90 %; routers are not compared" in text and "1.25 M" in text
    assert "3.3020 and 3.4780" in text and "export.dtype=fp32" in text
    for less in ({"rounding": None}, {"rounding": {}}, {"rounding": [1]}):
        page = build_report(_make(tmp_path / "fp32", SUMMARY | {"export": {"format": "mixtral"} | less}))
        assert "What rounding costs" not in page.read_text()
    odd = {"dtype": [], "survival": 5, "kl": "x"}
    page = build_report(_make(tmp_path / "odd", SUMMARY | {"export": {"format": "mixtral", "rounding": odd}}))
    assert "What rounding costs" in page.read_text()


@pytest.mark.usefixtures("rendered")
def test_figures_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    run = _make(tmp_path / "run", SUMMARY)
    one = readme_figure(run, tmp_path / "new" / "one.png").read_bytes()
    assert one.startswith(PNG) and readme_figure(run, tmp_path / "two.png").read_bytes() == one
    (run / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="holds no loss"):
        readme_figure(run, tmp_path / "three.png")


@pytest.mark.usefixtures("rendered")
def test_the_command_writes_json_and_nothing_else_to_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _make(tmp_path / "run", SUMMARY)
    assert main([str(run), "--json", "-", "--figure", str(tmp_path / "loss.png")]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["results"][2]["val_loss"] == 3.2 and found["report"] == str(run / "report.html")
    assert "Dense, continued: parameters" in found["not_measured"] and "val. loss" in shown.err
    assert (tmp_path / "loss.png").is_file()


def test_the_command_ends_with_2_on_a_users_mistake(tmp_path: Path) -> None:
    done = run_module("tools.report", str(tmp_path / "none"))
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: run directory=") and "Traceback" not in done.err

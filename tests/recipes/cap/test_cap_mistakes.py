"""What users get wrong: path, value, rule, remedy, all at once, exit code 2, before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.errors import ConfigError, Mistake
from tests.conftest import MakeCheckpoint
from tests.forked_commands import run_module
from tools.cap import main


def mistakes(*argv: str) -> dict[str, Mistake]:
    """By path."""
    with pytest.raises(ConfigError) as error:
        main(list(argv))
    return {mistake.path: mistake for mistake in error.value.mistakes}


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.cap.cap_report.load_system", lambda *a: pytest.fail("a model was loaded"))


def test_all_at_once(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = str(make_checkpoint("llama"))
    found = mistakes(
        *(folder, folder, str(tmp_path / "none"), "--batch-sizes", "0,2,2,x", "--prompt", "0", "--new", "1"),
        *("--rounds", "0", "--dtype", "fp8", "--peaks", "guessed", "--device", "cuda:7", "--threads", "0"),
        *(
            "--price-usd",
            "-1",
            "--pue",
            "0.5",
            "--busy",
            "2",
            "--choices",
            str(tmp_path / "q"),
            "--radar-batch",
        ),
        *("9", "--perplexity", "-1", "--anchors", "speed=1:2", "--text", str(tmp_path / "t.txt")),
        *("--json", str(tmp_path), "--tokenizer", str(tmp_path / "no"), "--life-years", "0", "--model", "m"),
        *("--lm-eval-dir", str(tmp_path / "tasks")),
    )
    expected = (
        *("FOLDER", "--batch-sizes", "--prompt", "--new", "--rounds", "--dtype", "--peaks", "--device"),
        *("--threads", "--price-usd", "--pue", "--busy", "--choices", "--perplexity", "--anchors", "--text"),
        *("--json", "--tokenizer", "--life-years", "--model", "--lm-eval-dir"),
    )
    assert set(expected) <= found.keys(), set(expected) - found.keys()
    assert all(mistake.rule and mistake.remedy.endswith(".") for mistake in found.values())


def test_two_systems_of_one_name(make_checkpoint: MakeCheckpoint) -> None:
    folder = str(make_checkpoint("llama"))
    assert "two systems have this name" in mistakes(f"a={folder}", f"a={folder}")["FOLDER"].rule


def test_a_prompt_that_the_model_does_not_take(make_checkpoint: MakeCheckpoint) -> None:
    # 64 positions
    found = mistakes(str(make_checkpoint("llama")), "--prompt", "60", "--new", "8")["--prompt"]
    assert "takes 64 tokens, and 68 are asked for" in found.rule
    assert "--prompt" in mistakes(str(make_checkpoint("llama")), "--perplexity", "1", "--prompt", "8")


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: 1\n")
    rules = {
        "none": "there is no config.json in it, and it is not a run",
        "bad": "its config.json is not JSON",
        "list": "its config.json holds no mapping",
        "run": "this run has no exported model yet",
        "run/dense": "the dense model of",
    }
    for name, rule in rules.items():
        assert rule in mistakes(str(tmp_path / name))["FOLDER"].rule


def test_either_folders_or_reports(make_checkpoint: MakeCheckpoint) -> None:
    assert "either folders or --compare" in mistakes()["FOLDER"].rule
    assert "FOLDER" in mistakes(str(make_checkpoint("llama")), "--compare", "a.json")


def test_what_a_server_cannot_do(make_checkpoint: MakeCheckpoint) -> None:
    folder = str(make_checkpoint("llama"))
    found = mistakes(
        *(folder, f"b={folder}", "--server", "host:80", "--perplexity", "2", "--overhead"),
        *("--backend", "eager", "--server-devices", "0", "--server-key", "NO_SUCH_VARIABLE"),
    )
    flags = {"--server", "--model", "FOLDER", "--perplexity", "--overhead", "--backend", "--server-devices"}
    assert flags | {"--server-key"} <= found.keys()


def test_the_harness_that_is_not_installed_is_named(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = mistakes(str(make_checkpoint("llama")), "--lm-eval", "arc_easy,piqa")["--lm-eval"]
    assert (found.value, found.rule) == ("arc_easy,piqa", "lm-evaluation-harness is not installed")
    assert "pip install lm-eval" in found.remedy


def test_the_exit_code_is_2() -> None:
    done = run_module("tools.cap", "nowhere", "--rounds", "0")
    assert done.code == 2 and done.out == ""
    lines = done.err.splitlines()
    assert [line.partition("=")[0] for line in lines] == ["error: --rounds", "error: FOLDER"]
    assert "Traceback" not in done.err

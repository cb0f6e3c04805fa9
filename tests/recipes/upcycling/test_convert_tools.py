"""The commands around conversion: what they print, write, refuse and return."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tools.upcycle
import tools.verify
from moe.errors import ConfigError
from moe.upcycle.equivalence import LayerDrift, LogitDrift
from recipes.studies.compare_methods import MethodDrift, drift_table, parse_candidates
from tests.conftest import MakeCheckpoint
from tests.recipes.models.test_model_code import own_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a tool's main with a command line."""

    def run(tool: Any, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        code: int = tool.main()
        return code

    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Enough for the gate."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return str(path)


def test_a_method_that_looks_at_text(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, text: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = make_checkpoint("llama", max_position_embeddings=256), tmp_path / "moe"
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(Path(text).read_text()[number:])
    arguments = ["--method", "cmoe", "--router", "analytical", "--experts", 4, "--text", tmp_path / "*.txt"]
    options = ["calibration.samples=4", "data.seq_len=32", f"cache_dir={tmp_path / 'cache'}"]
    options += ["data.validation_fraction=0.3"]
    assert call(tools.upcycle, "--dense", dense, "--out", out, *arguments, *options) == 0
    said = capsys.readouterr()
    assert "cmoe, 3 layers with 4 experts 8 wide and a shared one 16 wide" in said.out
    assert "calibration: " in said.err
    # Nothing of the calibration is left beside the output.
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".txt") == ["cache", "moe"]


def test_a_conversion_with_its_gate(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, text: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = make_checkpoint("qwen3", max_position_embeddings=256), tmp_path / "moe"
    arguments = ["--dense", dense, "--out", out, "--experts", 4, "--top-k", 2, "--verify", "--text", text]
    assert call(tools.upcycle, *arguments, "--json", tmp_path / "figures.json") == 0
    said = capsys.readouterr().out
    assert "copy, 3 layers with 4 experts 48 wide, router topk, top 2" in said
    assert "qwen3_moe, exact in transformers, vllm, llama.cpp" in said
    assert "1024 tokens: the same function" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["format"] == "qwen3_moe" and figures["claims_exact"] and figures["equivalence"]["agrees"]
    assert figures["bytes_written"] == figures["total_bytes"]
    # The same gate by itself, and on another function.
    gate = ["--dense", dense, "--text", text, "--samples", 2, "--sequence-length", 32]
    assert call(tools.verify, *gate, "--moe", out, "--gradients", "--json", "-") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["agrees"] and shown["tokens"] == 64 and max(shown["gradients"].values()) < 1e-4
    call(tools.upcycle, "--dense", dense, "--out", tmp_path / "noisy", "upcycle.noise_std=0.5")
    assert "another function than the dense model" in capsys.readouterr().out
    assert call(tools.verify, *gate, "--moe", tmp_path / "noisy") == 1
    assert "NOT the same function" in capsys.readouterr().out


@pytest.mark.parametrize("router", ["topk", "hash"])
def test_what_does_not_fit_is_verified_by_block(
    router: str,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    call: Call,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recipes.upcycling.convert.folder_check.spare_bytes", lambda: 0)
    arguments = ["--dense", make_checkpoint("llama", dtype="bfloat16"), "--out", tmp_path / "moe"]
    assert call(tools.upcycle, *arguments, "--router", router) == 0
    said = capsys.readouterr().out
    assert "the same function, as far as bfloat16 can tell" in said
    assert "the dense model was loaded by transformers' own loader, block by block" in said


def test_figures_on_stdout_are_alone_there(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--dense", make_checkpoint("llama"))
    call(tools.upcycle, *arguments, "--out", tmp_path / "moe", "--json", "-")
    assert json.loads(capsys.readouterr().out)["equivalence"]["agrees"]
    assert call(tools.upcycle, *arguments, "--out", tmp_path / "unseen", "--no-verify", "--json", "-") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["equivalence"] is None
    assert "exact by construction, not verified" in captured.err


def test_all_mistakes_at_once(make_checkpoint: MakeCheckpoint, tmp_path: Path, call: Call) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError) as caught:
        call(
            tools.upcycle, "--dense", tmp_path / "none", "--out", tmp_path / "there",
            "--experts", 2, "--top-k", 3, "--json", tmp_path,
        )  # fmt: skip
    said = "\n".join(str(mistake) for mistake in caught.value.mistakes)
    for part in ("the folder does not exist", "--out=", "router.top_k=3", "--json="):
        assert part in said, said


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--method", "copies"], "upcycle"),
        (["upcycle.noise=1"], "noise_std"),
        (["--router", "topp"], "router"),
        (["upcycle.layers=[9]"], "upcycle.layers"),
        (["--target", "gguf"], "--target='gguf'"),
        (["--target", "mixtral"], "Mixtral holds models of llama, mistral, not of qwen3"),
    ],
)
def test_mistakes_have_path_and_remedy(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, call: Call, options: list[str], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        call(tools.upcycle, "--dense", make_checkpoint("qwen3"), "--out", tmp_path / "moe", *options)
    assert not list(tmp_path.iterdir())


def test_methods_are_compared_under_trusted_code_alone(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, text: str, call: Call
) -> None:
    plain = make_checkpoint("llama")
    own = own_checkpoint(plain, tmp_path / "own", "own_model")
    rest = ("--compare", "copy,drop[ratio=0.5]", "--experts", 4, "--text", text, "--json", tmp_path / "json")
    with pytest.raises(ConfigError, match="it brings its own code"):
        call(tools.upcycle, "--dense", own, *rest)
    losses = {}
    for dense, trust in ((own, ["trust_remote_code=true"]), (plain, [])):
        assert call(tools.upcycle, "--dense", dense, *rest, *trust) == 0
        found = json.loads((tmp_path / "json").read_text())
        assert found["copy"]["logits"]["kl"] < 1e-6 < found["drop[ratio=0.5]"]["logits"]["kl"]
        losses[dense] = found["copy"]["dense_loss"]
    assert losses[own] != losses[plain]  # its code doubles the logits


def test_what_is_worse_than_guessing_is_named_and_a_dense_model_that_is_one_first() -> None:
    def drift(loss: float, dense_loss: float = 2.0) -> MethodDrift:
        logits = LogitDrift(max_diff=0.1, max_logit=1.0, kl=loss, argmax_agreement=0.5)
        layer = LayerDrift(0, 0.1, 0.9, 1.0, 0.1)
        return MethodDrift(False, logits, dense_loss, loss, (layer,), (1.0,), 1000, 0.5, math.log(16))

    found = drift_table({"a": drift(2.5), "b": drift(2.8), "c": drift(math.nan)})
    assert "worse than guessing (loss 2.773): b, c" in found
    assert "worse than guessing" not in drift_table({"a": drift(2.7)})
    found = drift_table({"a": drift(2.5, 3.0), "b": drift(2.9, 3.0)})
    assert "the dense model itself is worse than guessing (loss 2.773)" in found and ": b" not in found


def test_methods_to_compare_are_read_with_their_options() -> None:
    text = "copy, drop[ratio=0.25,independent=true],branch_train_mix[sources=[a,b],router.top_k=1]"
    copy, drop, branches = parse_candidates(text)
    assert copy.overrides == ("upcycle=copy",)
    assert drop.overrides == ("upcycle=drop", "upcycle.ratio=0.25", "upcycle.independent=true")
    assert branches.overrides[1:] == ("upcycle.sources=[a,b]", "router.top_k=1")
    with pytest.raises(ConfigError) as caught:
        parse_candidates("drop[,nope")
    assert len(caught.value.mistakes) == 1
    with pytest.raises(ConfigError, match="nope"):
        parse_candidates("copy,nope")

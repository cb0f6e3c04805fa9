"""Tuned blocks: what is chosen by an injected clock, and what a file of them must be. Nothing is timed."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.triton import tuned_blocks
from kernels.triton.triton_blocks import Blocks, Target, bucket, candidates, row_blocks, weight_blocks
from kernels.triton.tuned_blocks import Identity, TunedBlocksError, add, kernels_hash, read
from kernels.tune import Case, Layer, cases, choose, main, tune
from tests.patience import patience

HERE = Identity("NVIDIA H100 80GB HBM3", 90, "3.7.1", "5" * 64)
TARGET = Target(90, torch.bfloat16)
# 16384 * 8 rows over 64 experts are 2048 an expert: tiles of 128 rows.
LAYER = Layer(tokens=16384, experts=64, top_k=8, model_width=2048, expert_width=1000)
CASE = Case("down", "rows", 128, 2048, 1000)


def _clock(seconds: Callable[[Blocks], float | None]) -> Any:
    """A timer with made-up seconds; None: the candidate does not run."""

    def time(
        case: Case, known: Sequence[Blocks]
    ) -> tuple[Mapping[Blocks, Sequence[float]], Mapping[Blocks, str]]:
        found = {blocks: seconds(blocks) for blocks in known}
        # An outlier among three rounds must not count.
        rounds = {blocks: [value, value, 99.0] for blocks, value in found.items() if value is not None}
        return rounds, {blocks: "out of resources" for blocks, value in found.items() if value is None}

    return time


def test_a_case_for_each_kind_of_launch() -> None:
    # The bucket of 1000 is 1024; gate and up together are 2000, so 2048.
    found = {case.name: case.bucket for case in cases(LAYER, TARGET)}
    assert found == {
        "up": "up 128 1024 2048",
        "down": "rows 128 2048 1024",
        "dx": "rows 128 2048 2048",
        "dh": "dh 128 1024 2048",
        "dw_up": "dw 0 2048 2048",
        "dw_down": "dw 0 1024 2048",
    }


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize(
    ("kind", "height"), [(k, h) for k in ("up", "rows", "dh") for h in (128, 64, 32, 16)] + [("dw", 0)]
)
def test_candidates_begin_with_the_table_and_keep_the_height(kind: str, height: int, capability: int) -> None:
    target = Target(capability, torch.bfloat16)
    found = candidates(kind, height, target)
    assert found[0] == target.table()[kind, height] and len(set(found)) == len(found) > 1
    # Tiles are cut before the blocks are looked up: another height would compute other rows.
    assert {blocks.m for blocks in found} == {found[0].m}
    assert candidates("dw", 0, replace(target, dtype=torch.float32)) == (Blocks(64, 64, 16, 8, 2),)


def test_the_fastest_is_chosen_and_noise_is_not() -> None:
    table, other = candidates("rows", 128, TARGET)[:2]
    for seconds, expected in ((0.5, other), (0.97, other), (0.99, table), (1.5, table)):
        found = choose(CASE, TARGET, _clock(lambda blocks, s=seconds: s if blocks == other else 1.0))
        assert found.blocks == expected and not found.failed
        assert found.seconds[other] == seconds and next(iter(found.seconds)) == table


def test_candidates_that_do_not_run_are_named_and_the_table_must() -> None:
    table, *others = candidates("rows", 128, TARGET)
    found = choose(CASE, TARGET, _clock(lambda blocks: 1.0 if blocks == table else None))
    assert found.blocks == table and found.failed == dict.fromkeys(others, "out of resources")
    with pytest.raises(RuntimeError, match="down: the blocks of the table do not run: out of resources"):
        choose(CASE, TARGET, _clock(lambda blocks: None if blocks == table else 1.0))


def test_what_is_tuned_is_found_again_by_launches(tmp_path: Path) -> None:
    path = tmp_path / "new" / "blocks.json"

    def last_is_fastest(case: Case, known: Sequence[Blocks]) -> tuple[Any, Any]:
        return {blocks: [1.0 - 0.1 * i] for i, blocks in enumerate(known)}, {}

    said: list[str] = []
    found = tune(LAYER, "bf16", HERE, path, last_is_fastest, lambda tuning: said.append(tuning.case.name))
    assert said == [tuning.case.name for tuning in found] == ["up", "down", "dx", "dh", "dw_up", "dw_down"]
    target = replace(TARGET, tuned=read(path, HERE)["bf16"])
    for case in cases(LAYER, TARGET):
        best = candidates(case.kind, case.height, TARGET)[-1]
        if case.kind == "dw":
            assert weight_blocks(case.depth, case.columns, target) == best
            assert weight_blocks(case.depth, 8 * case.columns, target) == TARGET.table()["dw", 0]
        else:
            assert row_blocks(case.kind, 128, case.columns, case.depth, target) == best
            # Another bucket, another height: the table's.
            small = row_blocks(case.kind, 64, case.columns, case.depth, target)
            assert small == TARGET.table()[case.kind, 64]
    entry = json.loads(path.read_text())["blocks"]["bf16"]["rows 128 2048 1024"]
    assert entry["table_microseconds"] == 1e6 and entry["microseconds"] < 1e6
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".json"] == ["blocks.json"]


def _one(blocks: Blocks) -> Mapping[str, Mapping[str, Blocks]]:
    return {"bf16": {CASE.bucket: blocks}}


def test_results_are_added_and_what_is_foreign_is_written_anew(tmp_path: Path) -> None:
    path, known = tmp_path / "blocks.json", candidates("rows", 128, TARGET)
    add(path, HERE, _one(known[1]), {})
    other = bucket("dw", 0, 64, 64)
    add(path, HERE, {"fp16": {other: candidates("dw", 0, TARGET)[1]}}, {})
    add(path, HERE, _one(known[2]), {})
    found = read(path, HERE)
    assert found["bf16"] == {CASE.bucket: known[2]} and list(found["fp16"]) == [other]
    elsewhere = replace(HERE, source="6" * 64)
    add(path, elsewhere, _one(known[1]), {})
    assert read(path, elsewhere) == _one(known[1])


def _spoil(text: str, **changes: object) -> str:
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "[]", "holds no tuned blocks of format 1"),
        (lambda text: _spoil(text, format=2), "holds no tuned blocks of format 1"),
        (
            lambda text: _spoil(text, gpu="NVIDIA L4"),
            "holds for gpu 'NVIDIA L4', and here it is 'NVIDIA H100",
        ),
        (lambda text: _spoil(text, capability=80), "holds for capability 80, and here it is 90"),
        (lambda text: _spoil(text, triton="3.6.0"), "holds for triton '3.6.0', and here it is '3.7.1'"),
        (lambda text: _spoil(text, source="6"), "holds for source '6'"),
        (lambda text: _spoil(text, blocks=[]), "is damaged"),
        (lambda text: _spoil(text, blocks={"fp8": {}}), "is damaged"),
        (lambda text: text.replace('"m": 128', '"m": 64'), "is damaged.*not among the candidates"),
        (lambda text: text.replace('"m": 128,', ""), "is damaged"),
        (lambda text: text.replace("rows 128 2048 1024", "rows 128 2048 1000"), "is damaged"),
        (lambda text: text.replace("rows 128", "row 128"), "is damaged"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(
    spoil: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "blocks.json"
    add(path, HERE, _one(candidates("rows", 128, TARGET)[1]), {})
    text = path.read_text()
    path.write_text(spoil(text))
    assert path.read_text() != text
    with pytest.raises(TunedBlocksError, match=rf"GRAFT_TUNED_BLOCKS: {path} {message}(.|\n)*kernels.tune"):
        read(path, HERE)
    with pytest.raises(TunedBlocksError, match=rf"{tmp_path / 'no.json'} does not exist"):
        read(tmp_path / "no.json", HERE)


def _add_some(path: Path, first: int) -> None:
    blocks = candidates("rows", 128, TARGET)[1]
    for power in range(first, first + 8):
        add(path, HERE, {"bf16": {bucket("rows", 128, 2**power, 64): blocks}}, {})


def test_several_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_add_some, args=(path, first)) for first in (5, 13, 21)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(patience(60))
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(read(path, HERE)["bf16"]) == 24


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, known = tmp_path / "blocks.json", candidates("rows", 128, TARGET)
    add(path, HERE, _one(known[1]), {})

    def full(file: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        add(path, HERE, _one(known[2]), {})
    assert read(path, HERE) == _one(known[1])
    assert sorted(file.name for file in tmp_path.iterdir()) == [".blocks.json.lock", "blocks.json"]


def test_only_the_variable_makes_launches_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, known = torch.device("cuda", 0), candidates("rows", 128, TARGET)
    monkeypatch.setattr(tuned_blocks, "identity_of", lambda device: HERE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GRAFT_TUNED_BLOCKS", raising=False)
    add(HERE.path(), HERE, _one(known[1]), {})
    assert HERE.path().parent == tmp_path / "graft" / "blocks"
    assert HERE.path().name == "nvidia-h100-80gb-hbm3-triton-3.7.1-555555555555.json"
    assert tuned_blocks.tuned_blocks(device, torch.bfloat16) == {}
    other = tmp_path / "other.json"
    add(other, HERE, _one(known[2]), {})
    for wish, expected in (("0", {}), ("1", {CASE.bucket: known[1]}), (str(other), {CASE.bucket: known[2]})):
        monkeypatch.setenv("GRAFT_TUNED_BLOCKS", wish)
        assert tuned_blocks.tuned_blocks(device, torch.bfloat16) == expected
        assert tuned_blocks.tuned_blocks(device, torch.float32) == {}
        assert tuned_blocks.unsupported_reason(device) is None
    monkeypatch.setenv("GRAFT_TUNED_BLOCKS", str(tmp_path / "no.json"))
    assert "does not exist" in str(tuned_blocks.unsupported_reason(device))


def test_the_hash_is_of_the_files_with_kernels(tmp_path: Path) -> None:
    def written(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        return kernels_hash(folder)

    first = written(triton_up="@triton.jit", triton_launch="import torch")
    assert first == written(triton_up="@triton.jit", triton_launch="import os")
    assert first != written(triton_up="@triton.jit\n1") and first != written(triton_down="@triton.jit")
    assert kernels_hash() not in (first, written())


def test_the_command_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "8", "--experts", "4", "--model-width", "64", "--expert-width", "32", "--top-k"]
    if not torch.cuda.is_available():
        assert main([*sizes, "2"]) == 2
        assert "there is no GPU here" in capsys.readouterr().err
    for wrong, message in (("5", "cannot use more than the --experts 4"), ("0", "no positive number")):
        with pytest.raises(SystemExit) as stop:
            main([*sizes, wrong])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "GRAFT_TUNED_BLOCKS" in capsys.readouterr().out

"""A run goes on only as what it began as, and every difference is named."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe.errors import CheckpointError
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.data.config import DataConfig
from recipes.jobs.identity import check_resumed, data_parts, identity, refuse_changes
from recipes.jobs.run_dir import RunDir
from recipes.runtime.run_file import read_run_file, write_run_file
from tests.recipes.jobs.composed_once import composed_once

DENSE = Path("/models/dense")


@pytest.fixture(autouse=True)
def _composed_once() -> Iterator[None]:
    with composed_once():
        yield


def check(
    run: RunDir,
    *overrides: str,
    fingerprint: str = "f00d",
    dense: Path = DENSE,
    data_config: DataConfig | None = None,
) -> str:
    """`refuse_changes` on one rank."""
    values = compose_config(["+recipe=upcycle", *overrides])
    data: Any = SimpleNamespace(fingerprint=fingerprint)
    config = parse_config(values)
    named = config if data_config is None else dataclasses.replace(config, data=data_config)
    parts = None if data_config is None else data_parts(named, dense)
    return refuse_changes(run, identity(config, dense, data), values, parts)


def changes(run: RunDir, *overrides: str, **given: Any) -> list[str]:
    """The config paths that are refused."""
    try:
        check(run, *overrides, **given)
    except CheckpointError as error:
        return [mistake.path for mistake in error.mistakes]
    return []


def test_a_new_run_is_written_down(tmp_path: Path) -> None:
    check(RunDir(tmp_path), "router.top_k=3")
    written = read_run_file(tmp_path)["identity"]
    assert written["dense"] == str(DENSE)
    assert (written["router.top_k"], written["data"]) == (3, "f00d")
    assert "top_k: 3" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    "override",
    [
        "router.top_k=3",
        "router.score=sigmoid",
        "router.balance_coef=0.5",
        "upcycle.num_experts=4",
        "upcycle.layers=last:2",
        "upcycle.layers=[0,1]",
        "upcycle.noise_std=0.1",
        "seed=1",
        "data.seq_len=64",
        "train.global_batch_size=8",
    ],
)
def test_a_changed_field_is_refused_by_name(tmp_path: Path, override: str) -> None:
    run = RunDir(tmp_path, resumed=True)
    check(run)
    assert changes(run, override) == [override.partition("=")[0]]
    check(run)


def test_the_other_choices_and_sources_count(tmp_path: Path) -> None:
    run = RunDir(tmp_path, resumed=True)
    check(run)
    assert changes(run, "optim=muon") == ["optim.name"]
    assert changes(run, fingerprint="beef") == ["data"]
    assert changes(run, dense=Path("/models/other")) == ["dense"]
    assert changes(run, "router=switch", "seed=1") == ["router.renormalise", "router.top_k", "seed"]


@pytest.mark.parametrize(
    "override",
    ["train.steps=900", "train.save_every=7", "optim.lr=0.1", "train.micro_batch_size=1", "run.name=x"],
)
def test_what_does_not_change_the_meaning_of_weights_may_change(tmp_path: Path, override: str) -> None:
    run = RunDir(tmp_path, resumed=True)
    check(run)
    assert changes(run, override) == []


def test_values_that_json_changes_are_the_same_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path, resumed=True)
    check(run, "upcycle.layers=[0,2]")
    assert changes(run, "upcycle.layers=[0,2]") == []
    config = parse_config(compose_config(["+recipe=upcycle"]))
    config = dataclasses.replace(config, upcycle=dataclasses.replace(config.upcycle, layers=(0, 2)))  # type: ignore[arg-type]
    data: Any = SimpleNamespace(fingerprint="f00d")
    assert identity(config, DENSE, data)["upcycle.layers"] == [0, 2]


def test_a_refusal_says_both_values_and_changes_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path, resumed=True)
    check(run)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        check(run, "router.top_k=4")
    assert str(caught.value) == (
        f"router.top_k=4: the run in {tmp_path} began with 2. "
        "Set it back to go on, or start a new run with resume=none."
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_resume_tells_the_options_that_may_change_and_have(tmp_path: Path) -> None:
    run = RunDir(tmp_path, resumed=True)
    assert check(run) == ""  # it begins
    assert check(run) == ""
    assert check(run, "optim.lr=1e-5", "run.name=other", "resume=auto") == "optim.lr=1e-05 (was 0.001)"
    assert check(run, "optim.lr=1e-5") == ""


def test_options_are_compared_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(RunDir(tmp_path / "a"), "attention=moe")
    (step := tmp_path / "a" / "checkpoints" / "step-00000005").mkdir(parents=True)

    def told(*overrides: str) -> list[str]:
        where = ["+recipe=upcycle", f"output_dir={tmp_path}", "attention=moe", *overrides]
        config = parse_config(compose_config(where))
        return [f"{mistake.path}={mistake.value}" for mistake in check_resumed(config, {})]

    goes_on = ["run.name=a", "resume=auto"]
    # Neither the dense model's folder nor the tokens are known, and nothing is said of them.
    assert told(*goes_on) == told("run.name=new") == told("run.name=b", f"resume={step}") == []
    assert told(*goes_on, "optim.lr=1e-5", "dense=/other") == []
    assert told(*goes_on, "router.top_k=4", "seed=3") == ["router.top_k=4", "seed=3"]
    assert told("run.name=b", f"resume={step}", "data.seq_len=64") == ["data.seq_len=64"]
    assert "attention.router" in "".join(told(*goes_on, "attention=none"))
    # What is wrong with the directory is said of the directory.
    assert told("run.name=a", "router.top_k=4") == told("resume=/no/such", "router.top_k=4") == []
    monkeypatch.setenv("RANK", "1")
    assert told(*goes_on, "router.top_k=4") == []


def test_a_fork_is_compared_with_its_origin(tmp_path: Path) -> None:
    check(RunDir(tmp_path / "a"))
    fork = RunDir(tmp_path / "b", fork=tmp_path / "a" / "checkpoints" / "step-5")
    assert changes(fork, "router.top_k=4") == ["router.top_k"]
    assert not fork.path.exists()
    check(fork, "train.steps=900")
    assert read_run_file(fork.path)["identity"] == read_run_file(tmp_path / "a")["identity"]


def test_every_field_of_router_and_method_counts() -> None:
    config = parse_config(compose_config(["+recipe=upcycle"]))
    data: Any = SimpleNamespace(fingerprint="f00d")
    fields = identity(config, DENSE, data)
    for section in ("router", "upcycle"):
        for field in dataclasses.fields(getattr(config, section)):
            assert f"{section}.{field.name}" in fields


def test_the_run_file_keeps_what_it_held(tmp_path: Path) -> None:
    assert read_run_file(tmp_path) == {}
    write_run_file(tmp_path, a=1, b=None)
    write_run_file(tmp_path, b=2)
    assert read_run_file(tmp_path) == {"a": 1, "b": 2}
    (tmp_path / "run.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"resume='.*run.json': it is not JSON .* Restore it"):
        read_run_file(tmp_path)


def test_a_run_of_before_options_were_renamed_goes_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path, resumed=True)
    check(run)
    now = read_run_file(tmp_path)["identity"]
    old = {("sparsify" if path == "top_k_schedule" else path): value for path, value in now.items()}
    write_run_file(tmp_path, identity=old)
    assert changes(run, "router.top_k=4") == ["router.top_k"]
    check(run)
    assert read_run_file(tmp_path)["identity"] == now


def _grow(folder: Path) -> DataConfig:
    (folder / "a.txt").write_text("longer than before")
    return DataConfig(path=str(folder / "*.txt"))


def _remove(folder: Path) -> DataConfig:
    (folder / "b.txt").unlink()
    return DataConfig(path=str(folder / "*.txt"))


def _add(folder: Path) -> DataConfig:
    (folder / "c.txt").write_text("new")
    return DataConfig(path=str(folder / "*.txt"))


def _rewrite(folder: Path) -> DataConfig:
    (folder / "a.txt").write_text("EARLY")
    os.utime(folder / "a.txt", ns=(1, 1))
    return DataConfig(path=str(folder / "*.txt"))


def _split(folder: Path) -> DataConfig:
    return DataConfig(path=str(folder / "*.txt"), validation_fraction=0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_grow, "{}/a.txt was 5 bytes and is 18"),
        (_remove, "{}/b.txt is gone"),
        (_add, "{}/c.txt is new"),
        (_rewrite, "{}/a.txt was written to since"),
        (_split, "data.validation_fraction was 0.02 and is 0.5"),
    ],
)
def test_a_refusal_names_the_file_or_option_that_changed(
    tmp_path: Path, change: Callable[[Path], DataConfig], words: str
) -> None:
    run, folder = RunDir(tmp_path / "run", resumed=True), tmp_path / "text"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text("early")
    check(run, data_config=DataConfig(path=str(folder / "*.txt")))
    with pytest.raises(CheckpointError) as caught:
        check(run, fingerprint="beef", data_config=change(folder))
    [mistake] = caught.value.mistakes
    assert (mistake.path, mistake.value) == ("data", words.format(folder))
    assert "began with other data" in mistake.rule and "beef" not in str(mistake)


def test_a_run_from_before_documents_were_kept_apart_is_named(tmp_path: Path) -> None:
    run, folder = RunDir(tmp_path / "run", resumed=True), tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("early")
    config = DataConfig(path=str(folder / "*.txt"))
    check(run, data_config=config)
    written = read_run_file(run.path)
    del written["data_parts"]["options"]["data.document_mask"]
    write_run_file(run.path, data_parts=written["data_parts"])
    with pytest.raises(CheckpointError, match="data.document_mask was not there yet, which is false, and is"):
        check(run, fingerprint="beef", data_config=config)
    check(run, data_config=dataclasses.replace(config, document_mask=False))
    with pytest.raises(CheckpointError, match="data.document_mask was False and is True"):
        check(run, fingerprint="beef", data_config=config)


def test_a_refusal_names_the_tokenizer_the_template_and_the_default_model(tmp_path: Path) -> None:
    run, dense = RunDir(tmp_path / "run", resumed=True), tmp_path / "dense"
    dense.mkdir()
    (dense / "tokenizer.json").write_text("1")
    (tmp_path / "t.jinja").write_text("1")
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    config = DataConfig(
        path=str(tmp_path / "rows.jsonl"), format="chat", chat_template=str(tmp_path / "t.jinja")
    )
    given: dict[str, Any] = {"dense": dense, "data_config": config}
    check(run, f"dense={dense}", **given)
    (dense / "tokenizer.json").write_text("2")
    (tmp_path / "t.jinja").write_text("2")
    with pytest.raises(CheckpointError) as caught:
        check(run, f"dense={dense}", fingerprint="beef", **given)
    [mistake] = caught.value.mistakes
    named = [f"{path} holds something else" for path in (dense / "tokenizer.json", tmp_path / "t.jinja")]
    assert mistake.value == "; ".join(named)
    # The default model's folder is named by a hash of its options.
    other = RunDir(tmp_path / "other", resumed=True)
    check(other, dense=tmp_path / "cache" / "dense-f00d", data_config=config)
    with pytest.raises(CheckpointError) as caught:
        check(other, "model.hidden_size=64", dense=tmp_path / "cache" / "dense-beef", data_config=config)
    [mistake] = caught.value.mistakes
    assert mistake.path == "dense" and str(mistake.value).startswith("model.hidden_size was ")
    assert "began with another default model" in mistake.rule
    # Nothing that is written down has changed.
    with pytest.raises(CheckpointError, match="the tokens themselves, though options, files and tokenizer"):
        check(other, fingerprint="beef", dense=tmp_path / "cache" / "dense-f00d", data_config=config)

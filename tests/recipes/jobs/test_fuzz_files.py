"""Whatever is in a file that users hand in, it is read or refused in a sentence: no traceback, no folder."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import GraftError
from recipes.checkpoint import Origin, find_checkpoint, load_checkpoint, save_checkpoint
from recipes.data.config import DataConfig
from recipes.data.conversations import read_conversations
from recipes.data.indexed import IndexedDataset, IndexedWriter
from recipes.data.sources import check_paths, read_documents
from recipes.runtime.run_file import read_run_file, write_run_file
from recipes.runtime.safetensors_codec import HeaderError, read_header
from recipes.tracking.report import results_table
from recipes.tracking.report.run_record import read_run
from recipes.tracking.results import Results
from recipes.tracking.step_costs import Costs
from tests.conftest import MakeCheckpoint
from tests.fuzzing import DAMAGES, Damage, fuzzed
from tests.recipes.jobs.test_fuzz_options import LINE, Say, say  # noqa: F401

CHAT = [
    {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}], "weight": 1}
]
COSTS = Costs(*(1 for _ in dataclasses.fields(Costs)))
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
)
DENSE = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "chat_template.jinja"),
)
DATA = ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.bin", "d.idx", "e.txt", "chat.jsonl", "f.json")
RUN = (
    "run.json",
    "summary.json",
    "metrics.jsonl",
    "config.yaml",
    "manifest.json",
    "index.json",
    "state.json",
)


@pytest.fixture
def dense(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Path:
    """A good checkpoint in two files, with a chat template and conversations beside it."""
    folder = shutil.copytree(make_checkpoint("llama", sharded=True), tmp_path / "dense")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT[0]))
    if not (folder / "model.safetensors").exists():
        shutil.copy(make_checkpoint("llama") / "model.safetensors", folder)
    return folder


@fuzzed(12)
@given(name=st.sampled_from(DENSE), damage=DAMAGES)
def test_any_checkpoint_is_taken_or_refused(name: str, damage: Damage, dense: Path, say: Say) -> None:  # noqa: F811
    good = {path.name: path.read_bytes() for path in dense.iterdir()}
    if name.endswith("index.json"):
        (dense / "model.safetensors").unlink()
    (dense / name).write_bytes(damage.apply(good[name]))
    chat = ["data=chat", f"data.path={dense.parent / 'chat.jsonl'}"]
    try:
        code, lines = say(["+recipe=upcycle", *chat, "data.seq_len=16", f"dense={dense}"])
        assert code in (0, 2), lines
        assert code == 0 or LINE.fullmatch("\n".join(lines)), lines
        assert {path.name for path in dense.parent.iterdir()} == {"dense", "chat.jsonl"}
    finally:
        for file, content in good.items():
            (dense / file).write_bytes(content)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A folder of documents of every form."""
    lines = "".join(json.dumps({"text": f"text {i}", "n": i}) + "\n" for i in range(4)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "f.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "c.parquet")
    (tmp_path / "e.txt").write_text("plain text")
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, CHAT)))
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_documents(np.arange(8), [3, 5])
    return tmp_path


def read_all(folder: Path, name: str) -> None:
    """Reads a file as a run does, from its check to the last document."""
    path = folder / name
    config = DataConfig(path=str(path.with_suffix("") if path.suffix in (".bin", ".idx") else path))
    if name == "chat.jsonl":
        config = DataConfig(path=str(path), format="chat")
    if check_paths(config):
        return
    if name == "chat.jsonl":
        list(read_conversations(path))
    elif path.suffix in (".bin", ".idx"):
        indexed = IndexedDataset(path.with_suffix(""))
        [indexed.document(number) for number in range(indexed.num_documents)]
    else:
        list(read_documents(config, lambda line: None))


def refused_or(work: Callable[[], object]) -> None:
    """Does some work; errors of ours are sentences."""
    try:
        work()
    except GraftError as error:
        assert LINE.fullmatch(f"error: {error}"), error


@fuzzed(80)
@given(name=st.sampled_from(DATA), damage=DAMAGES)
def test_any_data_is_read_or_refused(name: str, damage: Damage, documents: Path) -> None:
    good = (documents / name).read_bytes()
    (documents / name).write_bytes(damage.apply(good))
    try:
        refused_or(lambda: read_all(documents, name))
    finally:
        (documents / name).write_bytes(good)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a checkpoint."""
    folder = tmp_path / "run"
    origin = Origin("r1")
    save_checkpoint(
        folder / "checkpoints", 2, {"a": torch.arange(9.0)}, {"step": 2, "val_loss": 1.0}, origin=origin
    )
    write_run_file(folder, run_id="r1", recipe="upcycle", started=1.0, parts=[{"started": 1.0, "ended": 2.0}])
    results = Results(folder / "summary.json", Results.read(folder / "summary.json"), writes=True)
    results.put_stage("moe", "MoE", 2.5, 128, COSTS, 10.0)
    (folder / "metrics.jsonl").write_text('{"stage":"moe","step":1,"loss":2.0,"time":1.0}\n' * 2)
    (folder / "config.yaml").write_text("job: upcycle\nseed: 0\n")
    return folder


def read_run_dir(folder: Path) -> None:
    """Reads all of a run that a resume or a report reads."""
    for work in (
        lambda: read_run_file(folder),
        lambda: find_checkpoint(folder / "checkpoints", run="r1"),
        lambda: load_checkpoint(folder / "checkpoints/step-2", {"a": torch.zeros(9)}),
        lambda: results_table(Results.read(folder / "summary.json")),
        lambda: read_run(folder),
    ):
        refused_or(work)


@fuzzed(50)
@given(name=st.sampled_from(RUN), damage=DAMAGES)
def test_any_run_directory_is_read_or_refused(name: str, damage: Damage, run: Path) -> None:
    path = next(iter(run.rglob(name)))
    good = path.read_bytes()
    path.write_bytes(damage.apply(good))
    try:
        read_run_dir(run)
    finally:
        path.write_bytes(good)


@fuzzed(50)
@given(damage=DAMAGES, nested=st.booleans())
def test_any_header_of_weights_is_read_or_refused(damage: Damage, nested: bool, dense: Path) -> None:
    good = (dense / "model.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = damage.apply(good[8 : 8 + length]) if nested else good[8 : 8 + length]
    bad = len(header).to_bytes(8, "little") + header + good[8 + length :]
    path = dense.parent / "bad.safetensors"
    path.write_bytes(bad if nested else damage.apply(good))
    try:
        read_header(path)
    except HeaderError as error:
        assert str(error).startswith("its "), error

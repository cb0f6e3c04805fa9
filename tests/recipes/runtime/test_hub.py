"""Addresses on the Hugging Face hub: what is fetched of them, and what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from moe.errors import ConfigError
from recipes.jobs.checked_run import check_command
from recipes.runtime.hub import Fetched, HubAddress, read_address
from tests.conftest import MakeCheckpoint
from tests.recipes.runtime.hub_server import COMMIT, Hub, hub_of
from tools.command import tool_parser


@pytest.fixture
def hub(tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A model in two files with other formats and code beside it, a model without weights, a dataset."""
    root = tmp_path / "hub"
    shutil.copytree(make_checkpoint("llama", sharded=True), root / "org" / "model")
    for name in ("code.py", "pytorch_model.bin", "consolidated.safetensors", "onnx/config.json"):
        file = root / "org" / "model" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    (root / "org" / "empty").mkdir()
    (root / "org" / "empty" / "config.json").write_text('{"model_type": "llama"}')
    (root / "org" / "gated").mkdir()
    texts = root / "datasets" / "org" / "texts"
    (texts / "data").mkdir(parents=True)
    for name in ("data/a.jsonl", "data/b.jsonl", "other.jsonl"):
        (texts / name).write_text(json.dumps({"text": name * 50}) + "\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_of(root) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


def test_forms_of_addresses() -> None:
    assert read_address("hf://a/b", "dense") == HubAddress("a/b", None, "", False)
    assert read_address("hf://a/b@v1", "dense") == HubAddress("a/b", "v1", "", False)
    wanted = HubAddress("a/b", "refs/convert/parquet", "default/*.parquet", True)
    assert read_address("hf://datasets/a/b@refs/convert/parquet/default/*.parquet", "data.path") == wanted


def test_a_model_is_fetched_as_transformers_reads_it(hub: Hub) -> None:
    fetched = Fetched()
    values = fetched.local({"dense": "hf://org/model@v1", "seed": 1, "list": ["x"]})
    folder = Path(values["dense"])
    assert (values["seed"], values["list"], folder.name) == (1, ["x"], COMMIT)
    assert not [name for name in hub.asked if name.endswith(".safetensors")]
    fetched.fetch_weights()
    source = hub.root / "org" / "model"
    names = {file.name for file in folder.iterdir()}
    left_out = {"code.py", "pytorch_model.bin", "consolidated.safetensors", "onnx"}
    assert names == {file.name for file in source.iterdir()} - left_out
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert len(hub.asked) == len(names), "each once"
    assert fetched.lines == [f"hub: hf://org/model@v1 is {folder}"]
    assert (Path(Fetched(code=True).local("hf://org/model", "dense")) / "code.py").is_file()


def test_without_a_network_the_cache_is_taken(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Fetched().local("hf://org/empty", "dense")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Fetched().local("hf://org/empty", "dense") == before
    with pytest.raises(ConfigError, match="not in the cache, and the hub cannot be reached"):
        Fetched().local("hf://org/model", "dense")


def test_files_of_a_dataset_keep_their_pattern(hub: Hub) -> None:
    found = Fetched().local("hf://datasets/org/texts/data/*.jsonl", "data.path")
    assert found.endswith(f"/snapshots/{COMMIT}/data/*.jsonl")
    assert hub.asked == ["a.jsonl", "b.jsonl"] or hub.asked == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize(
    ("path", "address", "rule"),
    [
        ("dense", "hf://model", "no address on the Hugging Face hub"),
        ("dense", "hf://org/model/file", "a whole repository of models"),
        ("data.path", "hf://org/model", "files of a repository of datasets"),
        ("data.path", "hf://datasets/org/texts", "files of a repository of datasets"),
        ("data.path", "hf://datasets/org/texts/*.parquet", "it has no such file"),
        ("dense", "hf://org/nobody", "no such repository, or it is private"),
        ("dense", "hf://org/model@v2", "it has no revision v2"),
        ("dense", "hf://org/gated", "its owner asks who reads it"),
    ],
)
def test_refusals_name_option_and_remedy(hub: Hub, path: str, address: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Fetched().local(address, path)
    (mistake,) = caught.value.mistakes
    assert (mistake.path, mistake.value) == (path, address) and rule in mistake.rule and mistake.remedy


def test_a_model_without_safetensors_is_refused(hub: Hub) -> None:
    fetched = Fetched()
    fetched.local("hf://org/empty", "dense")
    with pytest.raises(
        ConfigError, match=r"it has no model\.safetensors: Graft reads weights as safetensors"
    ):
        fetched.fetch_weights()


def test_a_run_fetches_weights_once_its_options_are_right(hub: Hub) -> None:
    given = ["+recipe=upcycle", "dense=hf://org/model", "data.path=hf://datasets/org/texts/data/*.jsonl"]
    with pytest.raises(ConfigError) as caught:
        check_command([*given, "router.top_k=99"])
    assert [mistake.path for mistake in caught.value.mistakes] == ["router.top_k"]
    assert not [name for name in hub.asked if name.endswith(".safetensors")]
    run = check_command([*given, "data.seq_len=16"], ranks=2)
    folder = Path(run.config.dense or "")
    assert folder.name == COMMIT and (folder / "model.safetensors.index.json").is_file()
    assert [o.partition("=")[0] for o in run.rank_overrides] == [
        "+recipe",
        "dense",
        "data.path",
        "data.seq_len",
    ]
    assert run.rank_overrides[1] == f"dense={folder}" and run.values["dense"] == str(folder)


def test_tools_take_addresses_and_write_here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*arguments: str) -> argparse.Namespace:
        parser = tool_parser("verify", "Compares.", example="--dense A")
        parser.add_argument("--dense")
        parser.add_argument("--out")
        parser.add_argument("options", nargs="*")
        return parser.parse_args(arguments)

    found = parsed("--dense", "hf://org/model", "dense=hf://org/model", "a=b")
    assert (Path(found.dense) / "config.json").is_file()
    assert found.options == [f"dense={found.dense}", "a=b"]
    with pytest.raises(ConfigError, match="--out='hf://org/model': results are written on this machine"):
        parsed("--out", "hf://org/model")

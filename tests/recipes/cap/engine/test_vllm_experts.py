"""The experts that a running vLLM's extension tells are those that transformers chooses for the same tokens.

``make real VLLM=ENV/bin/python`` runs it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import recipes.cap.engine
from recipes.cap.engine.recorded_passes import RecordedPass, begin_record, end_record
from recipes.cap.loading import known_from_config
from recipes.cap.server import Server, ServerError, call
from recipes.models.export import choose_exporter
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import export
from recipes.models.hf.config_file import read_config
from tests.conftest import MakeCheckpoint
from tests.patience import patience
from tests.recipes.models.test_native_formats import TOPK, moe_in

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

_VLLM = os.environ.get("VLLM") or None
_SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def _serving(folder: Path, log: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert _VLLM is not None
    command = [_VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--served-model-name", "m", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    command += ["--worker-extension-cls", "graft_vllm_experts.ExpertRecorder"]
    env = os.environ | _SETTINGS | {"PYTHONPATH": recipes.cap.engine.__path__[0]}
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=stream)
        try:
            server = Server(f"http://127.0.0.1:{port}", "m")
            _wait(server, process, log)
            yield server
        finally:
            process.terminate()
            process.wait(60)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(int(patience(300))):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            call(server, "/tokenize", {"model": "m", "prompt": "a"})
            return
        except ServerError:
            time.sleep(1)
    raise AssertionError(f"it does not start: {log.read_text()[-2000:]}")


@pytest.mark.skipif(_VLLM is None, reason="VLLM is not set")
def test_recorded_experts_are_those_of_router_logits(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 64, "max_position_embeddings": 128}
    model = moe_in(make_checkpoint("llama", **sizes), "all", TOPK, 0)
    folder = tmp_path / "hf"
    exporter, _ = choose_exporter(describe_model(model))
    export(model, exporter, model.module.state_dict().items(), folder, torch.float32, writes=True)
    prompts = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(1)).tolist()
    with _serving(folder, tmp_path / "log") as server:
        shape = known_from_config(read_config(folder), None)[0].shape
        begin_record(server, shape)
        alone = _ask(server, "alone", prompts[0])
        first = end_record(server)
        begin_record(server, shape)
        # One request of two prompts: they are scheduled together.
        both = _ask(server, "both", prompts[1], prompts[2])
        second = end_record(server)
        with pytest.raises(Exception, match="no record was begun"):
            end_record(server)
    judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = {"cmpl-alone-0": alone[0], "cmpl-both-0": both[0], "cmpl-both-1": both[1]}
    chosen = {name: _experts(judge, ids) for name, ids in tokens.items()}
    for passes in (first, second):
        assert sum(one.decodes for one in passes) >= 7
        for one in passes:
            assert list(one.experts_L) == _union(one, chosen)
    assert any(one.decodes and len(one.names) == 2 for one in second)


def _ask(server: Server, name: str, *prompts: list[int]) -> list[list[int]]:
    """Returns prompt and generated tokens of each prompt."""
    body = {"model": "m", "prompt": list(prompts), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    body |= {"request_id": name, "return_token_ids": True}
    choices = call(server, "/v1/completions", body)["choices"]
    return [[*prompt, *choice["token_ids"]] for prompt, choice in zip(prompts, choices, strict=True)]


@torch.no_grad()
def _experts(judge: Any, ids: list[int]) -> list[list[set[int]]]:
    """Returns the experts of each layer and token."""
    logits = judge(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits
    return [[set(row) for row in layer.topk(2, -1).indices.tolist()] for layer in logits]


def _union(one: RecordedPass, chosen: dict[str, list[list[set[int]]]]) -> list[set[int]]:
    """Returns the experts of the tokens of a pass, by layer."""
    found: list[set[int]] = [set() for _ in range(3)]
    for name, length, new in zip(one.names, one.batch.lengths, one.batch.new, strict=True):
        experts = next(value for key, value in chosen.items() if name.startswith(key))
        for layer in range(3):
            found[layer] |= set().union(*experts[layer][length - new : length])
    return found

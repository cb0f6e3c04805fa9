"""Every exporter in every program: certified where its claim says so, and nowhere else.

``make real VLLM=ENV/bin/python LLAMA_CPP=DIR`` runs it with the programs that are named. Heads are 32 wide,
the least that vLLM's attention takes on a CPU; the tokenizer is a published one, as llama.cpp refuses others.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.routers.configs import RouterConfig
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.configs.topk_config import TopKConfig
from recipes.cap.certify import consumer_classes
from recipes.cap.certify.base import Places
from recipes.cap.certify.certificate import certify
from recipes.cap.certify.observation import Request
from recipes.cap.certify.observed_module import observe_module
from recipes.data.config import DataConfig
from recipes.models.export import choose_exporter
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import export
from recipes.upcycling.convert.folder_check import real_tokens
from tests.conftest import random_model
from tests.recipes.models.test_native_formats import LLAMA3_ROPE, moe_in

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

_WITH_TOKENIZER = Path(os.environ.get("REAL", "real")) / "SmolLM2"
_SIZES: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 128,
    "intermediate_size": 192,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_HEADS, _TIED, _BIASED = {"head_dim": 32}, {"tie_word_embeddings": True}, {"attention_bias": True}
TOPK = TopKConfig(top_k=2)
PLAIN = TopKConfig(top_k=2, renormalise=False)
V3 = DeepSeekV3Config(top_k=2, routed_scaling=2.5)
GROUPED = DeepSeekV3Config(top_k=2, num_groups=2, top_groups=1, routed_scaling=2.5)
YARN = {"rope_type": "yarn", "rope_theta": 7000.0, "factor": 4.0, "original_max_position_embeddings": 256}
# Dense family, its options, layers, router, width of the shared expert in quarters of an expert's.
CASES: dict[str, tuple[str, dict[str, Any], str, RouterConfig, int]] = {
    "mixtral": ("llama", {}, "all", TOPK, 0),
    "mixtral, tied": ("llama", _TIED, "all", TOPK, 0),
    "mixtral, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}, "all", TOPK, 0),
    "mixtral, yarn": ("llama", {"rope_parameters": YARN}, "all", TOPK, 0),
    "mixtral, gelu": ("llama", {"hidden_act": "gelu"}, "all", TOPK, 0),
    "mixtral, window": ("mistral", {"sliding_window": 32}, "all", TOPK, 0),
    "qwen3_moe": ("qwen3", _HEADS, "all", TOPK, 0),
    "qwen3_moe, tied": ("qwen3", {**_HEADS, **_TIED}, "all", TOPK, 0),
    "qwen3_moe, biased": ("qwen3", {**_HEADS, **_BIASED}, "all", TOPK, 0),
    "qwen3_moe, dense layers": ("qwen3", _HEADS, "last:1", TOPK, 0),
    "qwen3_moe, sum below 1": ("qwen3", _HEADS, "all", PLAIN, 0),
    "qwen2_moe": ("qwen2", {}, "all", TOPK, 0),
    "qwen2_moe, sum below 1": ("qwen2", {}, "all", PLAIN, 0),
    "qwen2_moe, sum below 1, tied": ("qwen2", _TIED, "all", PLAIN, 0),
    "qwen2_moe, sum below 1, shared": ("qwen2", {}, "all", PLAIN, 4),
    "qwen2_moe, sum below 1, dense layers": ("qwen2", {}, "every:2", PLAIN, 0),
    "flex_olmo": ("olmo2", {}, "all", TOPK, 0),
    "flex_olmo, sum below 1": ("olmo2", {}, "all", PLAIN, 0),
    "flex_olmo, biased, tied": ("olmo2", {**_BIASED, **_TIED}, "all", TOPK, 0),
    "glm4_moe of llama": ("llama", {}, "all", V3, 0),
    "glm4_moe of llama, groups": ("llama", {}, "all", GROUPED, 0),
    "glm4_moe of llama, dense, shared": ("llama", {}, "last:2", V3, 8),
    "glm4_moe of llama, tied": ("llama", _TIED, "all", V3, 0),
    "glm4_moe of qwen2": ("qwen2", {}, "all", V3, 4),
    "glm4_moe of qwen3": ("qwen3", _HEADS, "last:1", V3, 0),
}


def _places() -> Places:
    named = {name: os.environ.get(name.upper()) for name in ("vllm", "llama_cpp", "llama_cpp_bin")}
    return Places(**{name: Path(value).expanduser() for name, value in named.items() if value})


@pytest.mark.parametrize("case", CASES)
def test_a_format_is_certified_where_it_claims_to_be_exact(case: str, tmp_path: Path) -> None:
    family, options, layers, router, shared = CASES[case]
    dense, folder = tmp_path / "dense", tmp_path / "hf"
    random_model(family, **_SIZES | options).save_pretrained(dense)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_WITH_TOKENIZER / file, dense)
    model = moe_in(dense, layers, router, shared)
    spec = describe_model(model)
    exporter, _ = choose_exporter(spec)
    assert exporter.name == case.split()[0].rstrip(",")
    export(model, exporter, model.module.state_dict().items(), folder, torch.float32, writes=True)
    request = Request(real_tokens(folder, DataConfig(), 2, 256).tolist(), 128, 8)
    reference = partial(observe_module, model.module, version="trainer")
    programs = [kind(_places(), print) for kind in consumer_classes().values()]
    results = certify(folder, reference, [one for one in programs if one.check() is None], request, print)
    claimed = {result.name: result.name in exporter.exact_in(spec) for result in results}
    assert {result.name: result.certified for result in results} == claimed

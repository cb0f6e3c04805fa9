"""What all tests share: quiet libraries, and tiny checkpoints of any family of transformers.

The checkpoints are drawn at random, everything in them: biases and norms too, and large enough that a
feed-forward network that is lost or altered shows in the logits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.parallel import arrange

# Before anything imports transformers, here or in a process that a test starts.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCABULARY = 300
_TEXTS = [
    "the quick brown fox jumps over the lazy dog\n" * 3,
    "def f(x):\n    return x + 1\n",
    "every expert is a copy of the dense feed-forward network\n",
]
# Three layers, four heads of eight over two of keys and values.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Families whose heads have a width of their own.
_WITH_HEAD_DIM = ("qwen3", "gemma2", "gemma3_text", "glm4")


class MakeCheckpoint(Protocol):
    """Makes a checkpoint; see `make_checkpoint`."""

    def __call__(
        self, family: str, *, tied: bool = ..., sharded: bool = ..., dtype: str = ..., **config: Any
    ) -> Path: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    items[:] = arrange(items, Path(__file__).parent)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of at most 300 entries."""
    from recipes.data.bpe import train_byte_level_bpe

    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    assert train_byte_level_bpe(_TEXTS, VOCABULARY, folder) <= VOCABULARY
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> MakeCheckpoint:
    """A factory of checkpoint folders; what was made is kept for the session, so change only copies of it."""
    made: dict[Any, Path] = {}

    def make(
        family: str, *, tied: bool = False, sharded: bool = False, dtype: str = "float32", **config: Any
    ) -> Path:
        key = (family, tied, sharded, dtype, repr(sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            _save(folder, family, {"tie_word_embeddings": tied} | config, sharded, dtype)
            shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
            made[key] = folder
        return made[key]

    return make


def _save(folder: Path, family: str, config: dict[str, Any], sharded: bool, dtype: str) -> None:
    import torch

    model = random_model(family, **config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="40KB" if sharded else "1GB")


def random_model(family: str, **config: Any) -> Any:
    """A tiny decoder of a family, in evaluation mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = {"head_dim": 8} if family in _WITH_HEAD_DIM else {"rotary_dim": 8} if family == "gptj" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SIZES | heads | config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

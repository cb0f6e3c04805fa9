"""What all tests share: quiet libraries, and tiny checkpoints of any family of transformers.

The checkpoints are drawn at random, everything in them: biases and norms too, and large enough that a
feed-forward network that is lost or altered shows in the logits.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests import fork_server, grid, thrift, yaml_cache
from tests.forked_python import interpreter
from tests.parallel import arrange
from tests.patience import patience, slowness
from tests.shared_runs import once, shared_folder

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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of grids."""
    grid.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Makes ready what all workers share: the speed of the machine, and the server that forks processes."""
    # Tests send signals; a shell starts what runs in the background (`make test &`) with some ignored.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    # Collecting imports everything, and each garbage collection would walk over all of it.
    gc.disable()
    yaml_cache.install()
    thrift.install()
    grid.configure(config)
    slowness()
    fork_server.prepare()
    if config.getoption("numprocesses", 0):
        # It imports while tests are collected.
        fork_server.start_server()
    if config.option.timeout is None:
        config.option.timeout = patience(float(config.getini("timeout")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Lets workers be forked as well: each would import for seconds what the server has imported."""
    for spec in specs:
        spec.python = spec.python or shlex.quote(interpreter(fork_server.start_server()))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes what the workers of the session have shared, once the last of them has ended."""
    if not hasattr(config, "workerinput"):
        fork_server.stop_server()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how many cases there were: those of grids, and a test without a grid is one."""
    reports = [
        report
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if getattr(report, "when", "") == "call" and not hasattr(report, "context")
    ]
    cases = sum(dict(report.user_properties).get(grid.CASES, 1) for report in reports)
    terminalreporter.write_line(f"{cases} cases in {len(reports)} tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with what takes longest; with ``--first``, keeps the first case of each test."""
    if items and items[0].config.getoption("first"):
        items[:] = grid.first_cases(items)
    items[:] = arrange(items)


_imported = [0]


def pytest_collection_finish() -> None:
    """Collects garbage again from here on."""
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Keeps what was imported out of later garbage collections.

    Jobs ask for several, and each would walk over half a million objects of libraries.
    """
    if len(sys.modules) > _imported[0] + 50:
        gc.collect()
        gc.freeze()
        _imported[0] = len(sys.modules)


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """A byte-level BPE of at most 300 entries."""
    return once(_train_tokenizer)


def _train_tokenizer() -> Path:
    from recipes.data.bpe import train_byte_level_bpe

    folder = shared_folder("tiny-tokenizer")
    assert train_byte_level_bpe(_TEXTS, VOCABULARY, folder) <= VOCABULARY
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer_folder: Path) -> MakeCheckpoint:
    """A factory of checkpoint folders; all workers of the session share them, so change only copies."""

    def make(
        family: str, *, tied: bool = False, sharded: bool = False, dtype: str = "float32", **config: Any
    ) -> Path:
        options = {"tie_word_embeddings": tied} | config
        return once(_save, family, sorted(options.items()), sharded, dtype, tokenizer_folder)

    return make


def _save(family: str, config: list[tuple[str, Any]], sharded: bool, dtype: str, tokenizer: Path) -> Path:
    import torch

    name = repr((family, config, sharded, dtype))
    folder = shared_folder(f"{family}-{hashlib.sha256(name.encode()).hexdigest()[:16]}")
    model = random_model(family, **dict(config)).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="40KB" if sharded else "1GB")
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


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

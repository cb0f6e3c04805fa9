"""The loss of conversations is the mean over counted tokens, whatever ranks and micro-batches there are.

Documents of text are kept apart as well, and all of their tokens count.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recipes.data.chat_samples import ChatSamples
from recipes.data.chat_tokens import ChatTokens
from recipes.data.indexed import IndexedDataset, IndexedWriter
from recipes.data.packing import OrderedDataset
from recipes.models.hf.packed_attention import keeps_apart
from recipes.runtime.interrupt import StopRequest
from recipes.training.training_loop import Loop, validation_loss
from tests.distributed_helper import run_ranks
from tests.recipes.engines.engine_cases import (
    GLOBAL_BATCH,
    SEQ_LEN,
    VOCABULARY,
    Case,
    Outcome,
    _look_before_first_step,
    _Record,
    make_model,
    make_stage,
    open_engine,
)

LENGTHS = [11, 10, 9, 8, 7, 13, 9, 8, 11, 7, 6, 9, 8, 12, 7, 2, 3, 5, 9, 8]
# fp32: sums in another order.
ROUNDING = {"rtol": 2e-5, "atol": 2e-7}


def write(folder: Path) -> None:
    """Conversations of 2 to 13 tokens, whose replies are from one token to nearly all of them."""
    draw = np.random.default_rng(0)
    with IndexedWriter(folder / "ids", np.uint16) as ids, IndexedWriter(folder / "counted", np.uint8) as own:
        for length in LENGTHS:
            ids.add_document(draw.integers(1, VOCABULARY, length))
            begin = int(draw.integers(1, length))
            own.add_document((np.arange(length) >= begin).astype(np.uint8))


def read_text(folder: Path) -> OrderedDataset:
    """The same tokens as documents of text."""
    ids = IndexedDataset(folder / "ids")
    return OrderedDataset(ids, SEQ_LEN, 0, np.arange(len(LENGTHS)), document_mask=True)


def read(folder: Path) -> ChatSamples:
    """All of them, in samples of 12 + 1 tokens."""
    chat = ChatTokens(IndexedDataset(folder / "ids"), IndexedDataset(folder / "counted"))
    return ChatSamples(chat, SEQ_LEN, 0, np.arange(len(LENGTHS)), np.array(LENGTHS), shuffled=False)


@dataclass(frozen=True)
class Way:
    """How a step is shared out.

    Attributes:
        ranks: Processes.
        micro: Samples of a forward pass on one.
        strategy: Of the engine.
        balance: Coefficient of the balance loss.
        text: Whether the tokens are documents of text.
        parallel: Ranks that tensors or experts are sharded over.
    """

    ranks: int
    micro: int
    strategy: str = "fsdp"
    balance: float = 0.0
    text: bool = False
    parallel: str | None = None

    def alone(self) -> Way:
        """The same in one forward pass of one rank."""
        return Way(1, GLOBAL_BATCH, balance=self.balance, text=self.text)

    def case(self) -> Case:
        """Of the engine's tests."""
        router = {"balance_coef": self.balance, "z_coef": self.balance / 5}
        more = {} if self.parallel is None else {self.parallel: 2}
        return Case({"strategy": self.strategy} | more, self.micro, router, steps=2)


WAYS = [
    Way(1, GLOBAL_BATCH),
    Way(1, 2),
    Way(2, 4),
    Way(2, 2),
    Way(2, 2, "ddp"),
    # The balance loss is of a micro-batch: over ranks the same, over more micro-batches another.
    Way(1, GLOBAL_BATCH, balance=0.5),
    Way(2, 4, balance=0.5),
    Way(1, GLOBAL_BATCH, text=True),
    Way(1, 2, text=True),
    Way(2, 2, text=True),
    Way(2, 4, text=True, parallel="expert_parallel"),
    Way(2, 8, text=True, parallel="tensor_parallel"),
]


def train_all(rank: int, world_size: int, folder: Path) -> dict[Way, Outcome]:
    """For `run_ranks`: every way of so many ranks."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    return {way: train(folder, way) for way in WAYS if way.ranks == world_size}


def train(folder: Path, way: Way) -> Outcome:
    """On this rank."""
    outcome, case, samples = Outcome(), way.case(), read_text(folder) if way.text else read(folder)
    engine = open_engine(**case.engine)
    train_module = engine.prepare(make_model(case), case.optim)
    _look_before_first_step(train_module, outcome, engine)
    data: Any = SimpleNamespace(train=samples, validation=samples, files=(), sources=())
    with tempfile.TemporaryDirectory() as checkpoints:
        stage = make_stage(case, train_module, Path(engine.broadcast(checkpoints)))
        stage.data = data
        outcome.notes["before"] = validation_loss(engine, train_module, data, stage.train)
        with patch("recipes.training.hooks.stage_saves.Saver.save"):
            Loop(engine, [_Record(outcome)], StopRequest()).run(stage)
        engine.barrier()
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files."""
    folder = tmp_path_factory.mktemp("chat")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[Way, Outcome]:
    """Of every way, on its first rank."""
    return run_ranks(train_all, 1, folder)[0] | run_ranks(train_all, 2, folder)[0]


def obvious_loss(folder: Path, first: int, count: int) -> float:
    """Every conversation on its own, token by token."""
    samples, model = read(folder), make_model(Way(1, 8).case())
    model.module.eval()
    losses = []
    for n in range(first, first + count):
        for _, start, length in samples._pieces(n):
            tokens = torch.tensor(samples._chat.ids.tokens(start, start + length).astype(np.int64))
            counted = samples._chat.counted.tokens(start, start + length)
            with torch.no_grad():
                log_p = F.log_softmax(model.module(input_ids=tokens[None]).logits[0].double(), -1)
            losses += [-float(log_p[i - 1, tokens[i]]) for i in range(1, length) if counted[i]]
    return sum(losses) / len(losses)


def obvious_text_loss(folder: Path, first: int, count: int) -> float:
    """Every stretch of a document on its own; its last token is the last input that sees it."""
    model = make_model(Way(1, 8).case())
    model.module.eval()
    ids = IndexedDataset(folder / "ids")
    stream, ends = ids.tokens(0, ids.num_tokens).astype(np.int64), set(ids.document_offsets.tolist())
    losses = []
    for n in range(first, first + count):
        start = n * SEQ_LEN
        cuts = sorted({start, start + SEQ_LEN} | {end for end in ends if start < end < start + SEQ_LEN})
        for begin, end in itertools.pairwise(cuts):
            with torch.no_grad():
                log_p = F.log_softmax(
                    model.module(input_ids=torch.tensor(stream[begin:end])[None]).logits[0], -1
                )
            losses += [-float(log_p[i - begin, stream[i + 1]]) for i in range(begin, end)]
    assert len(losses) == count * SEQ_LEN
    return sum(losses) / len(losses)


def test_counts_differ_from_sample_to_sample(folder: Path) -> None:
    samples = read(folder)
    counts = [samples.num_counted(n, 1) for n in range(GLOBAL_BATCH)]
    assert sum(counts[:4]) != sum(counts[4:])
    assert not bool(samples.metadata(0, samples.samples_per_epoch).real_BS.all()), "there is padding"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_step_is_the_mean_over_counted_tokens(folder: Path, outcomes: dict[Way, Outcome]) -> None:
    outcome = outcomes[Way(1, GLOBAL_BATCH)]
    assert outcome.rows[1]["loss"] == pytest.approx(obvious_loss(folder, 0, GLOBAL_BATCH), rel=1e-5)
    # Five validation samples at most: the last forward pass has three that do not count.
    assert outcome.notes["before"] == pytest.approx(obvious_loss(folder, 0, 5), rel=1e-5)
    # Padding reaches no router.
    used = int(read(folder).metadata(0, GLOBAL_BATCH).real_BS.sum())
    assert used < GLOBAL_BATCH * SEQ_LEN
    assert outcome.tokens == [used, used]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", [way for way in WAYS if way != way.alone()])
def test_any_ranks_and_micro_batches_do_what_one_does(way: Way, outcomes: dict[Way, Outcome]) -> None:
    one, other = outcomes[way.alone()], outcomes[way]
    for row, same in zip(other.rows, one.rows, strict=True):
        for name in {"loss", "val_loss", "grad_norm"} & set(same):
            assert row[name] == pytest.approx(same[name], rel=2e-5), (row["step"], name)
    # Both of the ranks that cut matrices meet all tokens.
    assert other.tokens == [count * (2 if way.parallel == "tensor_parallel" else 1) for count in one.tokens]
    for name, grad in one.grads.items():
        torch.testing.assert_close(other.grads[name], grad, **ROUNDING, msg=name)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_step_of_text_is_the_mean_over_documents_alone(folder: Path, outcomes: dict[Way, Outcome]) -> None:
    outcome = outcomes[Way(1, GLOBAL_BATCH, text=True)]
    assert outcome.rows[1]["loss"] == pytest.approx(obvious_text_loss(folder, 0, GLOBAL_BATCH), rel=1e-5)
    assert outcome.notes["before"] == pytest.approx(obvious_text_loss(folder, 0, 5), rel=1e-5)


def test_whether_a_host_keeps_conversations_apart(folder: Path) -> None:
    model = make_model(Way(1, 8).case())
    assert keeps_apart(model.module.eval())
    with patch.object(model.module, "forward", lambda input_ids, use_cache: None):
        assert not keeps_apart(model.module)

"""Checks an export of a checkpoint in one process, within a limit of memory, as a job checks its own.

Letters: B samples, S sequence length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe.errors import GraftError
from moe.upcycle.equivalence import LogitDrift
from recipes.config.sections.export_config import ExportConfig
from recipes.data.build_data import load_data
from recipes.data.sources import resolve
from recipes.jobs.default_model import cache_dir
from recipes.jobs.rounding import (
    RoundingCost,
    Start,
    SurvivalCount,
    loses_bits,
    rounded,
    rounding_cost,
    run_model,
)
from recipes.models.export.read_back import ReadBack, Unread
from recipes.models.export.write_export import require_written
from recipes.models.hf.config_file import vocabulary_size
from recipes.upcycling.convert.folder_check import describe_tokens, telling_rows, telling_tokens

if TYPE_CHECKING:
    from recipes.config.schema import RunConfig
    from recipes.models.hf.hf_model import HFModel

_Dtypes = Mapping[str, torch.dtype]


@dataclass(frozen=True)
class CheckedModel:
    """Model in a checkpoint, which an export must compute.

    Attributes:
        blank: Makes a model of its shapes, whose parameters have no memory.
        names: Names of its tensors.
        read: Reads one of them.
        dtypes: Dtype of each in the files.
        begun: Returns the weights at step 0.
    """

    blank: Callable[[], HFModel]
    names: list[str]
    read: Callable[[str], Tensor]
    dtypes: _Dtypes
    begun: Callable[[], Start]


@dataclass(frozen=True)
class ExportCheck:
    """Outcome of the check of an export.

    Attributes:
        logits: Drift of the reloaded model from the trained weights, rounded as in the files, in fp32.
        tokens: Tokens that it was measured on, for people.
        rounding: What the dtype of the files costs; None for fp32.
    """

    logits: LogitDrift
    tokens: str
    rounding: RoundingCost | None


class CheckpointUnread(Unread):
    """Model of a checkpoint, read a part at a time and changed on the way."""

    option = "RUN"

    def __init__(
        self,
        model: HFModel,
        source: CheckedModel,
        change: Callable[[Iterator[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]],
    ) -> None:
        super().__init__(model.module, model.folder)
        self._source = source
        self._change = change

    def fill(self, wanted: Callable[[str], bool]) -> None:
        """See `Unread.fill`."""
        names = filter(wanted, self._source.names)
        for name, tensor in self._change((name, self._source.read(name)) for name in names):
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor.float(), requires_grad=False)
            else:
                module._buffers[leaf] = tensor


@torch.no_grad()
def check_export(
    source: CheckedModel, unread: Unread, config: RunConfig, dense: Path, dtype: torch.dtype
) -> ExportCheck:
    """Compares an export with the checkpoint that it was made from, both in fp32.

    Args:
        source: The checkpoint's model.
        unread: The export.
        config: Config of the run, whose text is read.
        dense: The dense checkpoint, whose tokenizer reads it.
        dtype: Dtype of most of the files' tensors.

    Raises:
        ExactnessError: They do not compute the same.
        ModelError: The files lack a tensor, or hold one that does not fit.
    """
    tokens_BS, text = _tokens(config, dense)
    memory = config.section(ExportConfig).memory_gib * 2**30

    def evaluate(
        count: SurvivalCount | None, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[Tensor, list[Tensor]]:
        model = source.blank()
        ReadBack(CheckpointUnread(model, source, lambda each: rounded(each, dtypes, count)), memory)
        return run_model(model, tokens_BS)

    count = SurvivalCount(source.begun) if loses_bits(source.dtypes.values()) else None
    found = evaluate(count, source.dtypes)
    drift = require_written(ReadBack(unread, memory), unread.folder, tokens_BS, found[0])
    words = f"{describe_tokens(dense, tokens_BS)} of {text}"
    if count is None:
        return ExportCheck(drift, words, None)
    cost = rounding_cost(dtype, evaluate(None, {}), found, tokens_BS, count.result())
    return ExportCheck(drift, words, cost)


def _tokens(config: RunConfig, dense: Path) -> tuple[Tensor, str]:
    """Returns tokens of the run's validation text where it names some, and what they are."""
    # Of a blend, the first source.
    data, text = config.data.sources()[0], "the run's text"
    if data.validation_path is not None:
        data, text = data.of(data.validation_path), "the validation text"
    trust = config.trust_remote_code
    vocabulary = vocabulary_size(dense, trust_remote_code=trust)
    try:
        if resolve(data).kind == "indexed":
            load = partial(load_data, log=lambda line: None, trust_remote_code=trust)
            rows = load(config.data, dense, cache_dir(config), vocabulary).validation
            return telling_rows(dense, rows), "the validation text"
        return telling_tokens(dense, data, trust_remote_code=trust), text
    except (GraftError, OSError) as error:
        reason = str(error).splitlines()[0]
        drawn = torch.randint(vocabulary, (4, 256), generator=torch.Generator().manual_seed(0))
        return drawn, f"no text, but drawn: the run's cannot be read ({reason})"

"""Names the options of a run, beside its own, that an engine may look at before the run starts."""

from __future__ import annotations

from typing import Protocol

from moe.attention.attention_config import AttentionConfig
from moe.experts.experts import ExpertsConfig
from recipes.data.config import DataConfig


class DefaultModelShape(Protocol):
    """The sizes of the model that a run trains where it is given no checkpoint."""

    @property
    def vocab_size(self) -> int:
        """Entries of its vocabulary."""

    @property
    def hidden_size(self) -> int:
        """Width of the model."""

    @property
    def intermediate_size(self) -> int:
        """Width of its feed-forward networks."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""

    @property
    def num_heads(self) -> int:
        """Attention heads."""

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""


class RunOptions(Protocol):
    """What `Engine.check_run` reads; the config of a run has it."""

    @property
    def dense(self) -> str | None:
        """Folder of the dense checkpoint; None where the run trains its default model."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether code beside the checkpoint may run."""

    @property
    def model(self) -> DefaultModelShape:
        """The default model."""

    @property
    def attention(self) -> AttentionConfig | None:
        """Attention experts; None without."""

    @property
    def experts(self) -> ExpertsConfig:
        """Back end and low-rank factors of the experts."""

    @property
    def data(self) -> DataConfig:
        """Text and length of samples."""

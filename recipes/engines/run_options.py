"""Options of a run, besides the engine's own, that an engine may check before the run starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from moe.attention.attention_config import AttentionConfig
    from moe.experts.experts_config import ExpertsConfig
    from recipes.data.config import DataConfig


class DefaultModelShape(Protocol):
    """Sizes of the model that a run trains if it is given no checkpoint."""

    @property
    def vocab_size(self) -> int:
        """Number of entries of the vocabulary."""

    @property
    def hidden_size(self) -> int:
        """Width of the model."""

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward networks."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads."""


class RunOptions(Protocol):
    """Options that `Engine.check_run` reads; the config of a run has them."""

    @property
    def dense(self) -> str | None:
        """Folder of the dense checkpoint; None if the run trains its default model."""

    @property
    def trust_remote_code(self) -> bool:
        """True if code in the checkpoint's folder may run."""

    @property
    def model(self) -> DefaultModelShape:
        """Shape of the default model."""

    @property
    def attention(self) -> AttentionConfig | None:
        """Options of attention experts; None without them."""

    @property
    def experts(self) -> ExpertsConfig:
        """Back end and low-rank factors of the experts."""

    @property
    def data(self) -> DataConfig:
        """Text and length of samples."""

"""Options of a run, besides the engine's own, that an engine may check before the run starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recipes.models.hf.config_file import read_config
from recipes.models.hf.inspection import check_checkpoint

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


def model_config(run: RunOptions) -> dict[str, Any] | None:
    """Returns the ``config.json`` of a given model; None where its folder is none that could be."""
    if run.dense is None:
        return default_model_config(run.model)
    if check_checkpoint(run.dense, "dense", trust_remote_code=run.trust_remote_code):
        return None
    return read_config(Path(run.dense).expanduser())


def default_model_config(model: DefaultModelShape) -> dict[str, Any]:
    """Returns the shape of the default model, as its ``config.json`` will have it."""
    return {
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": 0,
        "rms_norm_eps": 0.0,
    }

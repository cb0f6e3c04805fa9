"""Registers Graft's own format with transformers' Auto classes when imported.

It is the only module with an effect on import.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from moe.errors import ModelError
from recipes.models.export.graft_format import MODEL_TYPE, GraftExporter, load_graft
from recipes.models.export.write_export import export
from recipes.models.hf.hf_model import HFModel


class GraftMoEConfig(PretrainedConfig):  # type: ignore[misc]
    """The config of an export in Graft's own format, as `AutoConfig` reads it."""

    model_type = MODEL_TYPE


class GraftMoEForCausalLM:
    """Loader for `AutoModelForCausalLM`: builds the dense model with its MoE layers in place."""

    config_class = GraftMoEConfig

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **options: Any) -> Any:
        """Loads an export as a model of the dense model's own class.

        Args:
            path: A local folder.
            args: Must be empty.
            options: ``dtype`` (or ``torch_dtype``), ``trust_remote_code``, and what the Auto classes add.

        Raises:
            ModelError: The folder is no such export, needs code that is not trusted, or an option is unknown.
        """
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        trust = options.pop("trust_remote_code", None) is True
        for added in ("config", "local_files_only", "adapter_kwargs", "_from_auto"):
            options.pop(added, None)
        # The Auto classes also pass on options that nobody has set.
        options = {name: value for name, value in options.items() if value is not None}
        if args or options:
            raise _unknown(options)
        dtype = dtype if isinstance(dtype, torch.dtype) else None
        model = load_graft(Path(path), dtype, trust_remote_code=trust)
        # The class's own method would write a dense config beside MoE weights.
        model.module.save_pretrained = types.MethodType(_saver(model), model.module)
        return model.module.eval()


def _unknown(options: dict[str, Any]) -> ModelError:
    rule = "they are unknown to Graft's own format"
    return ModelError.one("options", sorted(options), rule, "Leave them out.")


def _saver(model: HFModel) -> Any:
    def save_pretrained(module: Any, folder: str | Path, **options: Any) -> None:
        """Writes the model in Graft's own format."""
        if options:
            raise _unknown(options)
        tensors = module.state_dict().items()
        export(model, GraftExporter(), tensors, Path(folder), module.dtype, writes=True)

    return save_pretrained


AutoConfig.register(MODEL_TYPE, GraftMoEConfig)
AutoModelForCausalLM.register(GraftMoEConfig, GraftMoEForCausalLM)

"""``import recipes.models.auto``: from then on transformers' Auto classes load Graft's own format.

This import is for its effect, and the only one that has any.
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
    """What `AutoModelForCausalLM` calls: loads the dense host with its mixtures in place."""

    config_class = GraftMoEConfig

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **options: Any) -> Any:
        """Loads an export; the model is of the dense host's own class.

        Args:
            path: A local folder.
            args: None are taken.
            options: ``dtype`` (or ``torch_dtype``) and what the Auto classes add themselves.

        Raises:
            ModelError: The folder is no such export, or an option is not known here.
        """
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        for added in ("config", "local_files_only", "trust_remote_code", "adapter_kwargs", "_from_auto"):
            options.pop(added, None)
        # The Auto classes hand on what nobody has set.
        options = {name: value for name, value in options.items() if value is not None}
        if args or options:
            raise _unknown(options)
        model = load_graft(Path(path), dtype if isinstance(dtype, torch.dtype) else None)
        # The class' own method would write a dense config over a mixture's weights.
        model.module.save_pretrained = types.MethodType(_saver(model), model.module)
        return model.module.eval()


def _unknown(options: dict[str, Any]) -> ModelError:
    rule = "they are not known to Graft's own format"
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

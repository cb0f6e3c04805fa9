"""Parameter count and attention of a model of an unlisted family, from the module that transformers builds.

The module is built on the meta device: it takes no memory and reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe.accounting.mixers import Mixer
from moe.accounting.params import ParameterCount, count_parameters
from moe.accounting.shape import attention_from_config
from moe.errors import ConfigError, ModelError
from recipes.models.hf.config_file import code_keys, library_reads, with_floats


@dataclass(frozen=True)
class ModuleShape:
    """Parameter count and attention of a module.

    Attributes:
        count: Exact number of parameters.
        attention: Attention of each layer if the config shows that it is plain; else None, and FLOPs and
            cache are unknown rather than guessed.
    """

    count: ParameterCount
    attention: tuple[Mixer, ...] | None


def shape_from_module(config: Mapping[str, Any]) -> ModuleShape:
    """Builds the decoder of a ``config.json`` without memory and counts its parameters.

    Args:
        config: The content of the file. Code beside it is not run.

    Raises:
        ModelError: transformers does not know the family or rejects the config, its experts are not
            recognised, or it names code that transformers would fetch.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    content = with_floats(dict(config))
    if keys := code_keys(content):
        rule = f"the config asks for code of a hub ({keys[0]}), which is not run"
        raise ModelError.one("--from-module", True, rule, "Delete the key.")
    family = content.pop("model_type", None)
    remedy = "Check that the file is complete and that this version of transformers knows the model."
    with library_reads("model_type", family, remedy, "build it for counting"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built := AutoConfig.for_model(family, **content))
        count = count_parameters(model)
    try:
        attention = attention_from_config(built.to_dict())
    except ConfigError:
        attention = None
    return ModuleShape(count, attention)

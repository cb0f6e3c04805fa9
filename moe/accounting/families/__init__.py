"""How configs are read, one group of families a file."""

from __future__ import annotations

from collections.abc import Mapping

from moe.accounting.families import deepseek, gemma, glm, llama, olmo, others, phi, qwen
from moe.accounting.families.reading import Family

_GROUPS = (llama, qwen, gemma, olmo, phi, deepseek, glm, others)

# model_type to how it is read. Graft's own format is not here: it holds a config of one of these.
FAMILIES: Mapping[str, Family] = {name: entry for group in _GROUPS for name, entry in group.FAMILIES.items()}

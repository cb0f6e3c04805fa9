"""Readers of configs, one group of families per file."""

from __future__ import annotations

from collections.abc import Mapping

from moe.accounting.families import deepseek, gemma, llama, olmo, others, phi, qwen, sparse
from moe.accounting.families.reading import Family

_GROUPS = (llama, qwen, gemma, olmo, phi, deepseek, others, sparse)

# model_type to its reader. Graft's own format is not here, as it contains a config of one of these.
FAMILIES: Mapping[str, Family] = {name: entry for group in _GROUPS for name, entry in group.FAMILIES.items()}

"""Checks that dense models can be merged into one MoE model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.errors import Mistake
from recipes.models.hf.config_file import read_config
from recipes.models.hf.inspection import check_dense
from recipes.runtime.user_json import UserJsonError, read_json_file

# Config keys that may differ between models of one architecture: names, versions, file dtypes, generation.
_FREE_KEYS = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def check_sources(folders: Sequence[str], dense: str | None, *, trust_remote_code: bool) -> list[Mistake]:
    """Finds all reasons why folders cannot be branches of a dense model, from configs and headers alone.

    Args:
        folders: ``upcycle.sources``.
        dense: The seed model's folder, checked elsewhere; None for the default model.
        trust_remote_code: Whether folders may contain code.
    """
    if not folders:
        return []
    mistakes: list[Mistake] = []
    seed = None if dense is None else Path(dense).expanduser()
    if seed is not None and check_dense(str(seed), trust_remote_code=trust_remote_code):
        seed = None  # already reported as mistakes of dense
    for number, folder in enumerate(folders):
        where = f"upcycle.sources.{number}"
        found = check_dense(folder, trust_remote_code=trust_remote_code)
        mistakes += [Mistake(where, m.value, m.rule, m.remedy) for m in found]
        if found or seed is None:
            continue
        branch = Path(folder).expanduser()
        mistakes += _config_mistakes(where, folder, read_config(seed), read_config(branch))
        if _vocabulary(seed) != _vocabulary(branch):
            rule = "its tokenizer has another vocabulary than the dense model's"
            mistakes.append(
                Mistake(where, folder, rule, "Give models that were trained on from the dense one.")
            )
    return mistakes


def _config_mistakes(
    where: str, folder: str, seed: Mapping[str, Any], branch: Mapping[str, Any]
) -> list[Mistake]:
    differing = [
        key for key in sorted((seed.keys() & branch.keys()) - _FREE_KEYS) if seed[key] != branch[key]
    ]
    remedy = "Give models that were trained on from the dense one."
    return [
        Mistake(where, folder, f"its {key} is {branch[key]!r}, the dense model's is {seed[key]!r}", remedy)
        for key in differing
    ]


def _vocabulary(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        content = read_json_file(path)
    except UserJsonError as error:
        return error.clause  # equal to no vocabulary
    model = content.get("model") if isinstance(content, dict) else None
    return model.get("vocab") if isinstance(model, dict) else None

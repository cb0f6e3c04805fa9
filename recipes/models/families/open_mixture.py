"""Opens a mixture of any kind: of a family of transformers, or in Graft's own format."""

from __future__ import annotations

from pathlib import Path

from recipes.models.export.graft_format import MODEL_TYPE
from recipes.models.families.family_mixture import family_router, open_family
from recipes.models.families.graft_mixture import graft_router, open_graft
from recipes.models.families.source_mixture import SourceMixture, SourceRouter
from recipes.models.hf.config_file import read_config


def source_router(folder: Path) -> SourceRouter:
    """Returns the router of a mixture.

    Raises:
        ModelError: It is no mixture that Graft knows.
    """
    if read_config(folder).get("model_type") == MODEL_TYPE:
        return graft_router(folder)
    return family_router(folder)


def open_mixture(folder: Path, *, trust_remote_code: bool = False) -> SourceMixture:
    """Describes a mixture, and reads its routers.

    Args:
        folder: The mixture.
        trust_remote_code: Whether an export of a dense model with code of its own may run it; the families
            are transformers' own.

    Raises:
        ModelError: It is no mixture that Graft knows, or its files are not whole.
    """
    if read_config(folder).get("model_type") == MODEL_TYPE:
        return open_graft(folder, trust_remote_code=trust_remote_code)
    return open_family(folder)

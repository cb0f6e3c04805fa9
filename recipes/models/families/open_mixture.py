"""Opens a mixture of any kind: of a family of transformers, or in Graft's own format."""

from __future__ import annotations

from pathlib import Path

from moe.routers.configs import RouterConfig
from recipes.models.export.graft_format import MODEL_TYPE
from recipes.models.families.family_mixture import family_router, open_family
from recipes.models.families.graft_mixture import graft_router, open_graft
from recipes.models.families.source_mixture import SourceMixture
from recipes.models.hf.config_file import read_config


def source_router(folder: Path, *, trust_remote_code: bool = False) -> tuple[RouterConfig, int]:
    """Returns the router of a mixture, and its number of experts.

    Raises:
        ModelError: It is no mixture that Graft knows.
    """
    if read_config(folder).get("model_type") == MODEL_TYPE:
        return graft_router(folder)
    return family_router(folder, trust_remote_code=trust_remote_code)


def open_mixture(folder: Path, *, trust_remote_code: bool = False) -> SourceMixture:
    """Describes a mixture, and reads its routers.

    Raises:
        ModelError: It is no mixture that Graft knows, or its files are not whole.
    """
    is_own = read_config(folder).get("model_type") == MODEL_TYPE
    return (open_graft if is_own else open_family)(folder, trust_remote_code=trust_remote_code)

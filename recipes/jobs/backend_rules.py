"""Whether the library behind a forced back end of the experts is there, before anything starts."""

from __future__ import annotations

from kernels.third_party import THIRD_PARTY
from moe.errors import Mistake
from recipes.config.schema import RunConfig


def check_library(config: RunConfig) -> list[Mistake]:
    """Forcing another library's kernels is a mistake where it is missing, or of a version nobody has read.

    Whether it can run the layers is known once the model is: `kernels.expert_mlp.choose_backend` says so.
    """
    backend = config.experts.backend
    unsupported_reason = THIRD_PARTY[backend].missing() if backend in THIRD_PARTY else None
    if unsupported_reason is None:
        return []
    return [
        Mistake("experts.backend", backend, unsupported_reason, "Install it, or set experts.backend=auto.")
    ]

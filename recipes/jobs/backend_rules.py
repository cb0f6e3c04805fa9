"""Whether the library behind a forced back end of the experts is there, before anything starts."""

from __future__ import annotations

from kernels.third_party import RIVALS
from moe.errors import Mistake
from recipes.config.schema import RunConfig


def check_library(config: RunConfig) -> list[Mistake]:
    """Forcing another library's kernels is a mistake where it is missing, or of a version nobody has read.

    Whether it can run the layers is known once the model is: `kernels.expert_mlp.choose_backend` says so.
    """
    backend = config.experts.backend
    refusal = RIVALS[backend].missing() if backend in RIVALS else None
    if refusal is None:
        return []
    return [Mistake("experts.backend", backend, refusal, "Install it, or set experts.backend=auto.")]

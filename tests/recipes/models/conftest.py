"""What tests of several hosts share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def auto_classes() -> Iterator[None]:
    """The import, undone afterwards: other tests look at transformers without it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from recipes.models.auto import GraftMoEConfig

    yield
    CONFIG_MAPPING._extra_content.pop("graft_moe")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(GraftMoEConfig)
    del sys.modules["recipes.models.auto"]

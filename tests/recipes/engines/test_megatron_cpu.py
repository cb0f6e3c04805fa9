"""The patches that let megatron-core compute on CPUs; `test_megatron` shows that each is needed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from moe.errors import ConfigError
from recipes.engines.megatron.cpu_patches import PATCHES, cuda_type_names, on_cpu, require_version


def test_nothing_is_left_of_the_patches() -> None:
    def there() -> list[Any]:
        places = [importlib.import_module(patch.module) for patch in PATCHES.values()]
        return [place.__dict__.get(p.attribute) for place, p in zip(places, PATCHES.values(), strict=True)]

    before = there()
    with on_cpu():
        assert there() != before
    assert there() == before
    plain = torch.Tensor.type
    with cuda_type_names():
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.Tensor.type is plain


def test_another_version_is_refused_by_name() -> None:
    require_version("0.16.1")
    with pytest.raises(
        ConfigError, match=r"engine\.device='cpu': .* supports megatron-core 0\.16\.1, and 0\.17\.0"
    ):
        require_version("0.17.0")

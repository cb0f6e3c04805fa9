"""Calibration on packed conversations sees what each conversation on its own shows, and no padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe.upcycle.layer_plan import Draws
from moe.upcycle.statistics.layer_statistics import LayerStatistics, Wanted
from recipes.data.samples import TokenMetadata
from recipes.models.hf.ffn_blocks import find_ffns
from recipes.models.hf.hf_model import HFModel
from recipes.upcycling.calibration.observe import Observer
from tests.conftest import random_model

# Two conversations of 3 and 4 tokens in a sample of 9 + 1, the rest padding; the last two of each count.
TOKENS = [5, 6, 7, 8, 9, 10, 11, 0, 0, 0]


def importance(model: HFModel, batches: list[tuple[torch.Tensor, int, TokenMetadata | None]]) -> torch.Tensor:
    """``abs(h dL/dh)`` by neuron of the first layer."""
    site = find_ffns(model.module, model.config)[0]
    layers = {site.layer: LayerStatistics(site.weights, Wanted(("importance_F",), {}), Draws(0, site.layer))}
    observer = Observer(model, [site], layers)
    statistics = layers[site.layer]
    statistics.begin(0)
    with observer.watching(True):
        for tokens, first, metadata in batches:
            observer.show(tokens, torch.tensor([first]), True, metadata)
    statistics.finish(0, None)
    return statistics.asked_for()["importance_F"]


def metadata(weights: list[int], real: list[int], positions: list[int]) -> TokenMetadata:
    """Of one sample."""
    return TokenMetadata(
        torch.tensor([weights], dtype=torch.float32), torch.tensor([real]).bool(), torch.tensor([positions])
    )


def test_packing_and_padding_change_nothing() -> None:
    model = HFModel(random_model("llama", vocab_size=64, num_hidden_layers=2), Path(), torch.float32)
    packed = metadata(
        # Targets are tokens 1 to 9: 6 7 | 8 is the next conversation's first, 10 11 of its 9 10 11.
        [1, 1, 0, 0, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
        [0, 1, 2, 0, 1, 2, 3, 0, 1],
    )
    whole = importance(model, [(torch.tensor([TOKENS]), 0, packed)])
    # Each on its own, with one token behind it that does not count.
    first = metadata([1, 1, 0], [1, 1, 1], [0, 1, 2])
    second = metadata([0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 2, 3])
    apart = importance(
        model,
        [(torch.tensor([[5, 6, 7, 0]]), 0, first), (torch.tensor([[8, 9, 10, 11, 0]]), 3, second)],
    )
    assert whole.abs().max() > 0
    torch.testing.assert_close(whole, apart, rtol=1e-4, atol=1e-8)
    text = importance(model, [(torch.tensor([TOKENS]), 0, None)])
    assert not torch.allclose(whole, text, rtol=1e-2)


@pytest.mark.parametrize("count", [1, 3])
def test_marks_of_batches_go_together(count: int) -> None:
    one = metadata([1, 0], [1, 1], [0, 1])
    both = TokenMetadata.together([one] * count)
    assert both is not None and both.positions_BS is not None
    assert both.weights_BS.shape == both.real_BS.shape == both.positions_BS.shape == (count, 2)
    assert TokenMetadata.together([None]) is None
    assert both.after(count - 1).weights_BS.tolist() == [[1, 0]]
    assert both.times(3.0).weights_BS[0].tolist() == [3, 0]

"""Statistics of a layer against slow references, cut into any batches and ranks, stopped and gone on with.

Letters: T tokens, D model width, E clusters, F width of the dense network.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.build_experts import ffn_shape
from moe.upcycle.layer_plan import Draws
from moe.upcycle.statistics import statistic_classes
from moe.upcycle.statistics.base import LayerBatch
from moe.upcycle.statistics.layer_statistics import (
    LayerStatistics,
    Wanted,
    needs_gradient,
    reads_text,
    statistic_bytes,
    statistic_passes,
)
from tests.distributed_helper import run_ranks
from tests.moe.dispatch.gathered import random_batch
from tests.moe.routers.routing_cases import make_ffn

T = 60
OPTIONS = {
    "activation_rate_F": {"top_k": 3},
    "markers_TK": {"top_k": 3, "num_tokens": 20},
    "inputs_TD": {"num_tokens": 25},
    "centroids_ED": {"num_clusters": 3},
    "coactivation_FF": {"top_percent": 30},
    "row_clusters_F": {"num_clusters": 2},
}
EVERYTHING = Wanted(tuple(statistic_classes()), OPTIONS)


def gather(ffn: FFNWeights, wanted: Wanted, batches: list[LayerBatch]) -> dict[str, Tensor]:
    """The results asked for."""
    layer = LayerStatistics(ffn, wanted, Draws(3, 1))
    for number in range(len(layer.passes)):
        layer.begin(number)
        for batch in batches:
            layer.update(batch)
        layer.finish(number)
    return layer.asked_for()


def one(name: str, ffn: FFNWeights, batch: LayerBatch, **options: int) -> Tensor:
    """A single statistic."""
    return gather(ffn, Wanted((name,), {**OPTIONS, name: options}), [batch])[name]


def pieces(batch: LayerBatch, *bounds: int) -> list[LayerBatch]:
    """Its tokens in several batches."""
    edges = [0, *bounds, len(batch.x_TD)]
    assert batch.grad_out_TD is not None
    return [
        replace(batch, x_TD=batch.x_TD[a:b], index_T=batch.index_T[a:b], grad_out_TD=batch.grad_out_TD[a:b])
        for a, b in zip(edges, edges[1:], strict=False)
    ]


def hidden_and_grad(ffn: FFNWeights, batch: LayerBatch) -> tuple[Tensor, Tensor]:
    """By autograd through a plain network."""
    x = batch.x_TD
    up = x @ ffn.up_FD.t() + (0 if ffn.b_up_F is None else ffn.b_up_F)
    if ffn.gate_FD is None:
        hidden = torch.nn.functional.silu(up)
    else:
        gate = x @ ffn.gate_FD.t() + (0 if ffn.b_gate_F is None else ffn.b_gate_F)
        hidden = torch.nn.functional.silu(gate) * up
    hidden = hidden.detach().requires_grad_()
    out = hidden @ ffn.down_DF.t()
    assert batch.grad_out_TD is not None
    out.backward(batch.grad_out_TD)
    assert hidden.grad is not None
    return hidden.detach(), hidden.grad


def test_importance_is_what_autograd_says() -> None:
    for ffn in (make_ffn(biased=True), make_ffn(gated=False)):
        batch = random_batch(ffn, T)
        hidden, grad = hidden_and_grad(ffn, batch)
        expected = sum((hidden[t] * grad[t]).abs() for t in range(T)) / T
        torch.testing.assert_close(one("importance_F", ffn, batch), expected)


def test_importance_of_clusters_token_by_token() -> None:
    ffn = make_ffn()
    batch = random_batch(ffn, T)
    found = gather(ffn, Wanted(("importance_EF", "centroids_ED"), OPTIONS), [batch])
    hidden, grad = hidden_and_grad(ffn, batch)
    centroids, sums, counts = found["centroids_ED"].double(), torch.zeros(3, ffn.width), [0, 0, 0]
    assert centroids.shape == (3, ffn.model_width)
    for t in range(T):
        e = max(range(3), key=lambda e: float(centroids[e] @ batch.x_TD[t]))
        sums[e] += (hidden[t] * grad[t]).abs()
        counts[e] += 1
    expected = sums / torch.tensor(counts).clamp_min(1)[:, None]
    torch.testing.assert_close(found["importance_EF"].float(), expected)


def test_output_importance_token_by_token() -> None:
    ffn = make_ffn()
    batch = random_batch(ffn, T)
    hidden, _ = hidden_and_grad(ffn, batch)
    expected = sum((hidden[t] * ffn.down_DF.mean(0)).abs() for t in range(T)) / T
    torch.testing.assert_close(one("output_importance_F", ffn, batch), expected)


def marks_of(ffn: FFNWeights, x_D: Tensor, count: int) -> list[int]:
    """The neurons of largest normalised activation of one token."""
    x = (x_D / x_D.norm()).float()
    values = []
    for i in range(ffn.width):
        up = torch.dot(x, (ffn.up_FD[i] / ffn.up_FD[i].norm()).float())
        gate = up
        if ffn.gate_FD is not None:
            gate = torch.dot(x, (ffn.gate_FD[i] / ffn.gate_FD[i].norm()).float())
        values.append(abs(float(torch.nn.functional.silu(gate) * (1 if ffn.gate_FD is None else up))))
    return sorted(sorted(range(ffn.width), key=lambda i: -values[i])[:count])


@pytest.mark.parametrize("gated", [True, False])
def test_rates_and_markers_token_by_token(gated: bool) -> None:
    # Biases and the lengths of rows and tokens must not matter.
    ffn = make_ffn(gated=gated, biased=True)
    ffn = replace(ffn, up_FD=ffn.up_FD * torch.arange(1, ffn.width + 1)[:, None])
    batch = random_batch(ffn, T)
    expected = [marks_of(ffn, x_D, 3) for x_D in batch.x_TD]
    rate = torch.zeros(ffn.width, dtype=torch.float64)
    for metadata in expected:
        rate[metadata] += 1 / T
    torch.testing.assert_close(one("activation_rate_F", ffn, batch, top_k=3), rate)
    everything = one("markers_TK", ffn, batch, top_k=3, num_tokens=T)
    assert everything.tolist() == expected


def test_coactivation_token_by_token() -> None:
    for activation, percent in (("relu", 0), ("silu", 30)):
        ffn = make_ffn(gated=False, activation=activation)
        batch = random_batch(ffn, T)
        expected = torch.zeros(ffn.width, ffn.width)
        for x_D in batch.x_TD:
            hidden = ffn.up_FD @ x_D
            hidden = hidden.relu() if percent == 0 else torch.nn.functional.silu(hidden)
            active = {i for i in range(ffn.width) if hidden[i] > 0}
            if percent:  # 30 % of ten neurons
                active = set(sorted(range(ffn.width), key=lambda i: -abs(float(hidden[i])))[:3])
            for i in active:
                for j in active - {i}:
                    expected[i, j] += 1
        assert torch.equal(one("coactivation_FF", ffn, batch, top_percent=percent), expected)


def test_a_sample_is_bounded_and_of_the_text() -> None:
    ffn = make_ffn()
    batch = random_batch(ffn, T)
    sample = one("inputs_TD", ffn, batch, num_tokens=25)
    rows = [row.tolist() for row in batch.x_TD.float()]
    places = [rows.index(row.tolist()) for row in sample]
    assert len(places) == 25 and places == sorted(set(places))
    # Not the first ones, and all when there is room.
    assert places != list(range(25))
    assert torch.equal(one("inputs_TD", ffn, batch, num_tokens=99), batch.x_TD.float())


def test_a_sample_is_uniform() -> None:
    # Over 200 layers of seeds of their own, each of 60 tokens is in a sample of 25 about 200 * 25 / 60 = 83
    # times; the standard deviation is sqrt(200 * 0.417 * 0.583) = 7.
    ffn = make_ffn()
    batch = random_batch(ffn, T)
    counts = torch.zeros(T)
    for seed in range(200):
        layer = LayerStatistics(ffn, Wanted(("inputs_TD",), OPTIONS), Draws(seed, 0))
        layer.begin(0)
        layer.update(replace(batch, x_TD=torch.arange(T)[:, None].expand(T, ffn.model_width).double()))
        layer.finish(0)
        counts[layer.results["inputs_TD"][:, 0].long()] += 1
    assert float((counts - 200 * 25 / 60).abs().max()) < 4.5 * 7


def test_batches_do_not_matter() -> None:
    ffn = make_ffn(biased=True)
    batch = random_batch(ffn, T)
    whole = gather(ffn, EVERYTHING, [batch])
    for cut in ([batch.x_TD.shape[0] // 2], [1, 7, 30, 59]):
        parts = gather(ffn, EVERYTHING, pieces(batch, *cut))
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_padding_does_not_count() -> None:
    ffn = make_ffn()
    batch = random_batch(ffn, T)
    mask_T = torch.arange(T) % 3 != 1
    assert batch.grad_out_TD is not None
    garbage = replace(batch, x_TD=batch.x_TD.masked_fill(~mask_T[:, None], 1e3), mask_T=mask_T)
    kept = LayerBatch(ffn, batch.x_TD[mask_T], batch.index_T[mask_T], batch.grad_out_TD[mask_T])
    expected = gather(ffn, EVERYTHING, [kept])
    for name, value in gather(ffn, EVERYTHING, [garbage]).items():
        assert torch.equal(value, expected[name]), name


def test_going_on_within_any_pass_is_as_if_nothing_had_happened() -> None:
    ffn = make_ffn(biased=True)
    parts = pieces(random_batch(ffn, T), 15, 40)
    expected = gather(ffn, EVERYTHING, parts)
    for stop_pass in (0, 1):
        layer = LayerStatistics(ffn, EVERYTHING, Draws(3, 1))
        for number in range(len(layer.passes)):
            layer.begin(number)
            for place, batch in enumerate(parts):
                if (number, place) == (stop_pass, 2):
                    state = {name: value.clone() for name, value in layer.state().items()}
                    layer = LayerStatistics(ffn, EVERYTHING, Draws(3, 1))
                    layer.load(number, state, takes_sums=True)
                layer.update(batch)
            layer.finish(number)
        for name, value in layer.asked_for().items():
            assert torch.equal(value, expected[name]), name


def _on_rank(rank: int, ranks: int) -> dict[str, Tensor]:
    """Every other part for each of two ranks; stopped after the first part of the last pass."""
    ffn = make_ffn(biased=True)
    parts = pieces(random_batch(ffn, T), 15, 40, 45)
    group = torch.distributed.group.WORLD if ranks > 1 else None
    layer = LayerStatistics(ffn, EVERYTHING, Draws(3, 1))
    for number in range(len(layer.passes)):
        layer.begin(number)
        for place, batch in enumerate(parts[rank::ranks]):
            layer.update(batch)
            if place == 0 and number == 1:
                state = layer.state(group)
                layer = LayerStatistics(ffn, EVERYTHING, Draws(3, 1))
                layer.load(number, state, takes_sums=rank == 0)
        layer.finish(number, group)
    return layer.asked_for()


@pytest.mark.distributed
def test_two_ranks_gather_what_one_does() -> None:
    expected = gather(make_ffn(biased=True), EVERYTHING, pieces(random_batch(make_ffn(biased=True), T)))
    found = run_ranks(_on_rank, 2)
    for name, value in expected.items():
        assert torch.equal(found[0][name], found[1][name]), f"{name}: the ranks differ"
        # Sums of doubles in another order.
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_passes_are_in_order() -> None:
    assert statistic_passes(()) == ()
    assert statistic_passes(["importance_F"]) == (("importance_F",),)
    assert statistic_passes(["importance_EF"]) == (("inputs_TD", "centroids_ED"), ("importance_EF",))
    assert statistic_passes(["importance_EF", "importance_F"])[0] == (
        "inputs_TD",
        "centroids_ED",
        "importance_F",
    )
    # Weights alone need no text.
    (only,) = statistic_passes(["row_clusters_F"])
    assert only == ("row_clusters_F",) and not reads_text(only)
    assert needs_gradient(["inputs_TD", "importance_F"]) and not needs_gradient(["inputs_TD"])


def test_memory_is_told_by_name() -> None:
    shape = ffn_shape(make_ffn(D=6, F=10))
    found = statistic_bytes(shape, Wanted(("coactivation_FF", "importance_EF"), OPTIONS))
    # fp32 pairs; 25 rows of 6 fp32 and an id.
    assert found["coactivation_FF"] == 4 * 10 * 10 and found["inputs_TD"] == 25 * (6 * 4 + 8)
    assert set(found) == {"coactivation_FF", "inputs_TD", "centroids_ED", "importance_EF"}


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"no statistics called \['nope'\]"):
        Wanted(("nope",))
    with pytest.raises(AssertionError, match=r"inputs_TD has no options \['size'\]"):
        one("inputs_TD", make_ffn(), random_batch(make_ffn(), T), size=3)

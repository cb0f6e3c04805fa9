"""Steps whose loss or gradient is not finite, and spikes: no rank updates, all go on and resume alike."""

from __future__ import annotations

import math

import pytest
import torch

from recipes.runtime.config import FaultsConfig
from tests.distributed_helper import run_ranks
from tests.recipes.training.faulty_training import BIAS_RATE, Story, Told, tell_all

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Of a window of 4 one value lies 1.5 deviations above the mean at most: a second spike must be a higher one.
_SPIKES = FaultsConfig(spike_sigma=6.0, spike_window=4)
_BACK = FaultsConfig(spike_sigma=6.0, spike_window=4, rollback_after=2)
_MIXED = {1: "nan_loss", 4: "inf_gradient", 5: "nan_gradient"}
_KINDS = ("nan_loss", "inf_loss", "nan_gradient", "inf_gradient", "inf_loss_finite_gradient")
_SOME = ("nan_loss", "inf_gradient", "inf_loss_finite_gradient")
STORIES = {
    **{f"fsdp_{kind}": Story({1: kind}, steps=3) for kind in _KINDS},
    **{f"ddp_{kind}": Story({1: kind}, steps=3, engine={"strategy": "ddp"}) for kind in _SOME},
    **{f"ep_{kind}": Story({1: kind}, steps=3, engine={"expert_parallel": 2}, equal=True) for kind in _SOME},
    "mixed": Story(_MIXED, steps=8),
    "mixed_stopped": Story(_MIXED, steps=8, stop_at=5),
    "clean": Story(steps=8),
    "recomputed": Story(steps=8, engine={"activation_checkpointing": True}),
    "ended": Story(dict.fromkeys((3, 4, 5), "nan_loss"), steps=8, save_every=0, heals=True),
    "spikes": Story({5: "spike", 6: "nan_loss", 8: "higher"}, steps=10, guards=_SPIKES),
    "spikes_stopped": Story({5: "spike", 6: "nan_loss", 8: "higher"}, steps=10, guards=_SPIKES, stop_at=6),
    "back": Story({6: "spike", 7: "higher"}, steps=10, save_every=4, guards=_BACK),
    "back_stopped": Story({6: "spike", 7: "higher"}, steps=10, save_every=4, guards=_BACK, stop_at=3),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Told]]:
    """By rank."""
    return run_ranks(tell_all, 2, str(tmp_path_factory.mktemp("stories")), STORIES)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


@pytest.mark.parametrize("name", [name for name in STORIES if name.startswith(("fsdp", "ddp", "ep"))])
def test_no_rank_updates(name: str, told: list[dict[str, Told]]) -> None:
    for rank in (0, 1):
        found = told[rank][name]
        # The second step of three is bad: nothing of the model is another behind it, router biases included.
        assert same(found.weights[2], found.weights[1])
        assert not same(found.weights[1], found.weights[0]) and not same(found.weights[3], found.weights[2])
        assert [row.get("skipped", 0) for row in found.rows[1:]] == [0, 1, 0]
        assert [row["skipped_steps"] for row in found.rows[1:]] == [0, 1, 1]
        assert all(bool(torch.isfinite(t).all()) for t in found.state.values())
        # An optimizer that has taken two steps of three.
        counts = {
            float(t) for key, t in found.state.items() if key.startswith("optim.") and key.endswith(".step")
        }
        assert counts == {2.0}
    first, second = told[0][name], told[1][name]
    assert all(same(first.weights[step], second.weights[step]) for step in range(4))


def test_the_batch_is_written_down(told: list[dict[str, Told]]) -> None:
    written = told[0]["fsdp_nan_loss"].written["moe-step-00000002.json"]
    # 8 samples a step, micro-batches of 2 on each of two ranks: the second step begins with sample 8.
    assert [rank["samples"] for rank in written["ranks"]] == [[[8, 2], [12, 2]], [[10, 2], [14, 2]]]
    assert (written["stage"], written["step"], written["loss"]) == ("moe", 2, "nan")
    assert written["ranks_with_a_bad_loss"] == [1] and written["ranks"][1]["losses"] == ["nan", "nan"]
    assert all(math.isfinite(loss) for loss in written["ranks"][0]["losses"])
    said = told[0]["fsdp_nan_loss"].said
    assert (
        "at step 2 the loss is nan" in said and "(from rank 1)" in said and "moe-step-00000002.json" in said
    )
    assert told[1]["fsdp_nan_loss"].said == ""
    gradient = told[0]["ep_inf_gradient"]
    assert gradient.written["moe-step-00000002.json"]["ranks_with_a_bad_loss"] == []
    assert "it came up in a backward pass" in gradient.said


@pytest.mark.parametrize("name", ["mixed", "spikes", "back"])
def test_a_resumed_run_is_the_same_to_the_last_bit(name: str, told: list[dict[str, Told]]) -> None:
    for rank in (0, 1):
        straight, stopped = told[rank][name], told[rank][f"{name}_stopped"]
        assert straight.error is None and stopped.error is None
        assert straight.weights.keys() == stopped.weights.keys()
        assert all(same(weights, stopped.weights[step]) for step, weights in straight.weights.items())
        assert same(straight.state, stopped.state)
        for row, other in zip(straight.rows, stopped.rows, strict=True):
            for key in ("step", "loss", "grad_norm", "lr", "skipped_steps", "skipped", "went_back_to"):
                assert repr(row.get(key)) == repr(other.get(key)), (row["step"], key)
    assert [row["step"] for row in told[0][name].rows if "skipped" in row] == {
        "mixed": [2, 5, 6],
        "spikes": [6, 7, 9],
        "back": [7, 8],
    }[name]


def test_too_many_in_a_row_end_the_run(told: list[dict[str, Told]]) -> None:
    for rank in (0, 1):
        found = told[rank]["ended"]
        assert found.error is not None and found.error[0] == "DivergedError"
        for part in (
            "at step 6 the loss is nan",
            "3 steps in a row",
            "moe-step-00000006.json",
            "resume=auto",
        ):
            assert part in found.error[1]
        assert sorted(found.written) == [f"moe-step-0000000{step}.json" for step in (4, 5, 6)]
        # One checkpoint, as the last good step left it, random state included: without the fault the run goes
        # on from there as one that never had it.
        assert found.saved == [3, 8]
        clean = told[rank]["clean"]
        assert same(found.state, clean.state)
        assert all(same(weights, clean.weights[step]) for step, weights in found.weights.items())


@pytest.mark.parametrize("name", ["clean", "recomputed", "mixed"])
def test_the_bias_moves_once_a_global_batch(name: str, told: list[dict[str, Told]]) -> None:
    # Two micro-batches on each of two ranks: a sign step of the rate an expert, in steps that update alone.
    found = told[0][name]
    skipped = {int(row["step"]) for row in found.rows if "skipped" in row}
    biases = [key for key in found.weights[0] if key.endswith("router.bias_E")]
    assert len(biases) == 2
    moved = 0
    for step in range(1, 9):
        for key in biases:
            change = (found.weights[step][key] - found.weights[step - 1][key]).abs() / BIAS_RATE
            sizes = {round(size, 3) for size in change.tolist()}
            assert sizes <= ({0.0} if step in skipped else {0.0, 1.0}), (step, key)
            moved += 1.0 in sizes
    assert moved == 2 * (8 - len(skipped))


def test_recomputed_activations_are_counted_once(told: list[dict[str, Told]]) -> None:
    for rank in (0, 1):
        plain, recomputed = told[rank]["clean"], told[rank]["recomputed"]
        assert all(same(weights, recomputed.weights[step]) for step, weights in plain.weights.items())


def test_a_spike_is_judged_by_the_steps_before_it(told: list[dict[str, Told]]) -> None:
    found = told[0]["spikes"]
    assert same(found.weights[6], found.weights[5]) and same(found.weights[9], found.weights[8])
    assert "step 6 is skipped, a spike (1 in a row): its loss is" in found.said
    assert "6 standard deviations" in found.said


def test_spikes_in_a_row_go_back_to_the_newest_checkpoint(told: list[dict[str, Told]]) -> None:
    found = told[0]["back"]
    assert [row["went_back_to"] for row in found.rows if "went_back_to" in row] == [4]
    # The weights of step 4, and on with the samples behind the spikes.
    assert same(found.weights[8], found.weights[4]) and not same(found.weights[6], found.weights[4])
    assert not same(found.weights[9], found.weights[8])
    assert [row["step"] for row in found.rows] == list(range(11))

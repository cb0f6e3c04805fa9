"""Mistakes in a ``top_k_schedule`` section are told before a run starts, with their paths, all at once."""

from __future__ import annotations

import pytest

from moe.errors import ConfigError, Mistake
from moe.routers import router_configs
from recipes.config.compose import compose_config
from recipes.config.schema import RunConfig, parse_config
from recipes.jobs.option_rules import check_layers, check_router
from recipes.jobs.top_k_schedules import check_top_k_schedule, schedule_of, top_k_schedule_identity

# 10 steps of 16 samples of 128 tokens: 2048 tokens a step.
SHORT = ("train.steps=10", "optim.schedule.warmup_steps=2")
VARYING = sorted(name for name, cls in router_configs().items() if cls.varies_top_k)


def parsed(top_k_schedule: str, *overrides: str) -> RunConfig:
    """The config of a command line."""
    phases = f"top_k_schedule={top_k_schedule}"
    return parse_config(compose_config(["+recipe=upcycle", *SHORT, phases, *overrides]))


def told(mistakes: list[Mistake]) -> list[str]:
    """As a user reads them."""
    return [str(mistake) for mistake in mistakes]


def test_a_section_that_fits() -> None:
    config = parsed("[{until:0.5,top_k:[6,4]},{until:16384,top_k:4,layers:1}]")
    assert check_top_k_schedule(config) == check_router(config) == check_layers(config, 4) == []
    schedule = schedule_of(config, [0, 1, 2])
    assert schedule is not None and schedule.starts == (0, 5, 8)
    assert [tuple(schedule.at(step).values()) for step in (0, 5, 8)] == [(6, 4, 2), (4, 2, 2), (2, 2, 2)]
    assert top_k_schedule_identity(config) == [
        {"until_step": 5, "top_k": [6, 4], "layers": None},
        {"until_step": 8, "top_k": 4, "layers": 1},
    ]


def test_no_section_and_no_training_have_no_schedule() -> None:
    config = parsed("[]")
    assert check_top_k_schedule(config) == [] and schedule_of(config, [0]) is None
    assert top_k_schedule_identity(config) is None
    assert schedule_of(parsed("[{until:0.5,top_k:4}]", "train.steps=0"), [0]) is None


def test_rules_of_a_phase_are_told_with_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("[{until:0.5,top_k:4},{until:1,top_k:[],layers:2},{until:soon,top_k:1,upto:3}]")
    lines = told(list(caught.value.mistakes))
    assert {line.partition(":")[0] for line in lines} == {
        "top_k_schedule.1.until=1.0",
        "top_k_schedule.1.layers=2",
        "top_k_schedule.1.top_k=[]",
        "top_k_schedule.2.until='soon'",
        "top_k_schedule.2.upto=3",
    }


@pytest.mark.parametrize(
    ("top_k_schedule", "overrides", "expected"),
    [
        (
            "[{until:0.5,top_k:9}]",
            (),
            [
                "top_k_schedule.0.top_k=9: a token cannot use more experts than the 8 of "
                "upcycle.num_experts. Set router.top_k to 8 or less, or raise upcycle.num_experts."
            ],
        ),
        # The router's own rules of a K: here groups.
        (
            "[{until:0.5,top_k:4,layers:2}]",
            ("router=deepseek_v3", "router.num_groups=4"),
            [
                "top_k_schedule.0.top_k=4: a token uses router.top_k=4 experts, and "
                "router.top_groups=1 of 4 groups"
            ],
        ),
        # And those that its config checks by itself.
        (
            "[{until:0.5,top_k:[3,1]}]",
            ("router.top_k=3",),
            [
                "top_k_schedule.0.top_k=1: the only weight is then always 1, and the router gets no gradient",
                "top_k_schedule.0.top_k=[3, 1]: in layer 1 from below fewer experts would be followed by "
                "more. ",
            ],
        ),
        (
            "[{until:0.5,top_k:4,layers:1},{until:0.7,top_k:4}]",
            (),
            ["top_k_schedule.0.top_k=4: in layer 1 from below fewer experts would be followed by more. "],
        ),
        (
            "[{until:0.5,top_k:5},{until:0.45,top_k:4},{until:20480,top_k:3}]",
            (),
            [
                "top_k_schedule.1.until=0.45: it ends at step 5, and the phase before it at step 5. Order",
                "top_k_schedule.2.until=20480.0: it ends at step 10, and the run has 10 steps of 2048 "
                "tokens. The",
            ],
        ),
        (
            "[{until:0.5,top_k:4}]",
            ("router=gshard",),
            [
                "router.name='gshard': this router cannot change its number of experts between steps. Leave "
                f"top_k_schedule out, or choose a router of: {', '.join(VARYING)}."
            ],
        ),
    ],
)
def test_what_does_not_fit_the_run(
    top_k_schedule: str, overrides: tuple[str, ...], expected: list[str]
) -> None:
    lines = told(check_top_k_schedule(parsed(top_k_schedule, *overrides)))
    assert len(lines) == len(expected), lines
    for line, begins in zip(lines, expected, strict=True):
        assert line.startswith(begins), line


def test_phases_name_no_more_layers_than_become_mixtures() -> None:
    config = parsed("[{until:0.5,top_k:[4,4,4]},{until:0.6,top_k:3,layers:3}]", "upcycle.layers=every:2")
    assert check_layers(config, 6) == []
    assert told(check_layers(config, 4)) == [
        "top_k_schedule.0.top_k=[4, 4, 4]: it names 3 layers, and 2 become MoE layers. Name 2 at most.",
        "top_k_schedule.1.layers=3: it names 3 layers, and 2 become MoE layers. Name 2 at most.",
    ]


def test_a_router_by_a_key_that_no_data_has_is_refused() -> None:
    config = parsed("[]", "router=keyed")
    assert told(check_router(config)) == [
        "router.key='modality': the data of a run carries no such key of its tokens: it is for callers of "
        "the library. Set router.key=token_ids, and router.edges to the first ids of the ranges."
    ]
    config = parsed("[]", "router=keyed", "router.key=token_ids", "router.edges=[4,8196]")
    (line,) = told(check_router(config))
    assert line.startswith(
        "router.edges=[4.0, 8196.0]: 2 edges make 3 ranges, and there are 8 experts. Give 7 edges, "
    )
    config = parsed(
        "[]", "router=keyed", "router.key=token_ids", "router.edges=[4,8196]", "upcycle.num_experts=3"
    )
    assert check_router(config) == []

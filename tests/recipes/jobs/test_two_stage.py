"""Training on conversations, in one stage and in two: what it leaves; a stopped run goes on exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.config.sections.stage2_config import Stage2Config
from recipes.jobs.stage2_options import stage2_config
from tests.recipes.jobs.chat_runs import TEMPLATE, chat_options, two_stage_options, write_chat
from tests.recipes.jobs.job_runs import (
    Ended,
    StopAt,
    job,
    loads,
    rows,
    same_training,
    steps,
    summary,
    weights,
)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of conversations, and the runs on them."""
    folder = tmp_path_factory.mktemp("chat")
    write_chat(folder, "general", 0)
    write_chat(folder, "maths", 1)
    return folder


@pytest.fixture(scope="module")
def go(talks: Path) -> Callable[..., Ended]:
    """Runs both stages under a name."""

    def run(name: str, stop_at: StopAt | None = None, **changes: Any) -> Ended:
        options = {key.replace("__", "."): value for key, value in changes.items()}
        return job(talks, two_stage_options(talks, **{"run.name": name} | options), stop_at)

    return run


@pytest.fixture(scope="module")
def straight_run(talks: Path) -> Ended:
    """Both stages without a stop, with the report."""
    return job(talks, two_stage_options(talks, **{"run.name": "straight"}), full=True)


@pytest.fixture(scope="module")
def straight(straight_run: Ended, talks: Path) -> Path:
    """Its directory."""
    assert straight_run.code == 0, straight_run.err
    return talks / "outputs" / "straight"


def test_it_leaves_both_stages(straight: Path, straight_run: Ended) -> None:
    assert steps(straight / "stage1" / "checkpoints") == steps(straight / "checkpoints") == [2, 4]
    assert [row["step"] for row in rows(straight, "stage1")] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows(straight, "moe")] == [0, 1, 2, 3, 4]
    dense, first, second = summary(straight)["results"]
    assert [row["model"] for row in (dense, first, second)] == ["dense", "stage1", "moe"]
    # 4 steps of 4 samples of 48 tokens each, and those of both stages.
    assert (first["tokens"], second["tokens"]) == (768, 1536)
    assert first["label"], second["label"] == ("MoE after stage 1", "MoE after stage 2")
    one, two = summary(straight)["stages"]
    assert (one["stage"], two["stage"], one["steps"], two["steps"]) == (1, 2, 4, 4)
    assert one["val_loss"] == rows(straight, "stage1")[-1]["val_loss"]
    assert two["val_loss"] == second["val_loss"] == rows(straight, "moe")[-1]["val_loss"]
    # All rows of the table are of the second stage's validation data: the first is where the second began.
    assert two["val_loss_before"] == first["val_loss"] == rows(straight, "moe")[0]["val_loss"]
    assert two["val_loss_stage1"] != one["val_loss"]
    for said in (
        "MoE after stage 1",
        "MoE after stage 2",
        "documents of a sample do not see one another",
    ):
        assert said in straight_run.out
    report = (straight / "report.html").read_text()
    assert "MoE after stage 2" in report
    assert "The two stages" in report


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint of one rank."""
    from safetensors import safe_open

    with safe_open(checkpoint / "rank-00000.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_the_second_begins_with_the_weights_of_the_first_and_nothing_else(
    straight: Path, go: Callable[..., Ended], talks: Path
) -> None:
    # Two steps of warm-up in the first stage, one in the second, each from its beginning.
    rates = [[row["lr"] for row in rows(straight, stage)[1:3]] for stage in ("stage1", "moe")]
    assert rates[0] == pytest.approx([1e-3 / 3, 2e-3 / 3])
    assert rates[1][0] == pytest.approx(5e-4)
    assert go("still", stage2__lr=0, stage2__steps=2).code == 0
    run_dir = talks / "outputs" / "still"
    first = tensors(run_dir / "stage1" / "checkpoints" / "step-00000004")
    second = tensors(run_dir / "checkpoints" / "step-00000002")
    model = [key for key in first if key.startswith("global/model.")]
    assert len(model) > 10
    # Nothing is learnt at a rate of 0, so that the weights are those that it began with.
    assert all(torch.equal(first[key], second[key]) for key in model)
    counts = {float(value) for key, value in second.items() if ".step#" in key}
    assert counts == {2.0}, "the optimizer's own two steps"


def test_the_export_talks_by_the_template_of_the_run(straight: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(straight / "hf")
    assert tokenizer.chat_template == TEMPLATE
    assert weights(straight / "hf")


@pytest.mark.parametrize(("stage", "step"), [("stage1", 1), ("moe", 1)])
def test_a_stopped_run_goes_on_in_its_stage(
    stage: str, step: int, go: Callable[..., Ended], straight: Path, talks: Path
) -> None:
    name = f"stopped-{stage}"
    stopped = go(name, StopAt(stage, step))
    run_dir = talks / "outputs" / name
    assert stopped.code == 130, stopped.err
    assert (run_dir / "checkpoints").is_dir() is (stage == "moe")
    # By its path, as the message says, and not by its name.
    resumed = go(name, resume=run_dir)
    assert resumed.code == 0, resumed.err
    assert f"{stage}: going on from" in resumed.out
    same_training(run_dir, straight, ("stage1", "moe"))
    assert loads(run_dir) == loads(straight)
    for section in ("results", "stages"):
        ours, theirs = summary(run_dir)[section], summary(straight)[section]
        timed = {"tokens_per_s", "flops_per_token_forward", "flops_per_token_train"}
        assert [{k: v for k, v in row.items() if k not in timed} for row in ours] == [
            {k: v for k, v in row.items() if k not in timed} for row in theirs
        ]
    again = go(name, resume=run_dir)
    assert again.code == 0
    assert again.out.count("finished by an earlier process") == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage2__path": None}, "stage2.path=None: the second stage has no data"),
        ({"stage2__path": "none.jsonl"}, "stage2.path='none.jsonl': does not exist"),
        ({"stage2__warmup_steps": 9}, "stage2.warmup_steps=9"),
        ({"stage2__steps": 0}, "stage2.steps=0: must be at least 1"),
        ({"train__steps": 0}, "train.steps=0: a stage trains"),
        ({"compare__cpt": "true"}, "compare.cpt=True: two stages have no dense baseline"),
        ({"data__chat_template": None}, "the default model's tokenizer has no chat template"),
        ({"data__path": None}, "data.path=None: there is no chat data to fall back on"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    changes: dict[str, Any], said: str, go: Callable[..., Ended], talks: Path
) -> None:
    ended = go("wrong", **changes)
    assert ended.code == 2
    assert said in ended.err
    assert not (talks / "outputs" / "wrong").exists()


def test_a_row_that_is_found_wrong_late_leaves_no_run(talks: Path) -> None:
    rows = (talks / "general.jsonl").read_text(encoding="utf-8")
    (talks / "late.jsonl").write_text(f'{rows}{{"messages": 3}}\n', encoding="utf-8")
    ended = job(talks, chat_options(talks, **{"run.name": "late", "data.path": str(talks / "late.jsonl")}))
    assert (ended.code, "has a int under 'messages'" in ended.err) == (2, True)
    assert not (talks / "outputs" / "late").exists()


def test_the_same_data_twice_and_a_lone_checkpoint_are_refused(
    go: Callable[..., Ended], talks: Path, straight: Path
) -> None:
    ended = go("wrong", stage2__path=str(talks / "general.jsonl"))
    assert "it is the data of the first stage" in ended.err
    ended = go("wrong", resume=straight / "checkpoints" / "step-00000004")
    assert "a checkpoint belongs to one of the two stages" in ended.err
    for change in ({"train__steps": 5}, {"stage2__path": write_chat(talks, "code", 2)}):
        ended = go("straight", resume="auto", **change)
        assert ended.code == 2
        assert "began with" in ended.err


def test_one_stage_on_conversations_is_an_ordinary_run(talks: Path) -> None:
    options = chat_options(talks, **{"run.name": "plain", "compare.cpt": "true"})
    ended = job(talks, options)
    assert ended.code == 0, ended.err
    run_dir = talks / "outputs" / "plain"
    dense, cpt, moe = summary(run_dir)["results"]
    # Copies are exact: both begin where the dense model is, by the replies alone.
    for stage in ("cpt", "moe"):
        assert rows(run_dir, stage)[0]["val_loss"] == pytest.approx(dense["val_loss"], rel=1e-5)
    assert cpt["val_loss"] != dense["val_loss"] != moe["val_loss"]
    stopped = job(talks, options | {"run.name": "plain-stopped"}, StopAt("moe", 2))
    assert stopped.code == 130
    resumed = job(talks, options | {"run.name": "plain-stopped", "resume": "auto"})
    assert resumed.code == 0, resumed.err
    same_training(talks / "outputs" / "plain-stopped", run_dir)


def test_a_frozen_stage_is_of_the_first_alone() -> None:
    values = compose_config(["+recipe=llama_moe_v2", "optim.frozen.steps=5", "stage2.steps=40"])
    config = parse_config(values)
    second = stage2_config(config)
    assert config.optim.frozen.steps == 5 and second.optim.frozen.steps == 0
    assert second.train.steps == 40 and second.optim.lr == config.section(Stage2Config).lr

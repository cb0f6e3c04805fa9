"""The reference of options: every option has its entry, and the page is what the schema says."""

from __future__ import annotations

import json

import pytest

from moe.errors import ConfigError
from recipes.config.compose import compose_config
from recipes.config.reference import all_options, answer, choices, page
from recipes.config.schema import parse_config
from recipes.launch import main
from tests.grid import each
from tests.paths import ROOT


def test_the_page_is_what_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_CACHE", raising=False)
    all_options.cache_clear()
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == page(), "run python -m recipes.config.reference > docs/options.md"


def test_every_option_of_a_run_has_an_entry() -> None:
    values = compose_config(["+recipe=upcycle", "attention=moe"])
    paths = {option.path for option in all_options()}

    def leaves(content: object, path: str) -> list[str]:
        inner = content.items() if isinstance(content, dict) else ()
        return [leaf for key, value in inner for leaf in leaves(value, f"{path}.{key}".strip("."))] or [path]

    named = {"router.name", "upcycle.name", "engine.name"}
    missing = [leaf for leaf in leaves(values, "") if leaf not in paths | named and leaf[:10] != "attention."]
    assert not missing


def test_an_options_entry_has_type_default_and_meaning() -> None:
    told = answer(["train.async_save"])
    assert told.startswith("train.async_save: true | false, default true. Train on while a checkpoint is")
    assert "engine.zero_stage (of engine=deepspeed): 0 | 1 | 2 | 3, default 1." in answer(
        ["engine.zero_stage"]
    )
    assert "micro_batch | sequence | global_batch" in answer(["router.balance_scope"])  # a named type
    assert "optim.schedule.warmup_steps: int, default 20." in answer(["optim.schedule"])
    assert "choices of optim:\n  adamw" in answer(["optim"])


@each(
    "group, choice",
    [("router", "deepseek_v3"), ("router", "ssr"), ("upcycle", "drop"), ("engine", "megatron")],
)
def test_a_default_is_the_value_of_a_run_with_that_choice(group: str, choice: str) -> None:
    values = compose_config(["+recipe=upcycle", f"{group}={choice}"])[group]
    own = {o.path: o.default for o in all_options() if o.path.startswith(f"{group}.") and o.choice == choice}
    expected = {
        f"{group}.{key}": value if isinstance(value, str) and value else json.dumps(value)
        for key, value in values.items()
        if key != "name"
    }
    assert {path: default.replace("${seed}", "0") for path, default in own.items() if default} == expected


def test_what_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean train.async_save"):
        answer(["train.asynch_save"])
    with pytest.raises(ConfigError, match="Did you mean router"):
        choices("routers")


def test_choices_have_a_line_each() -> None:
    listed = choices("router")
    files = {file.stem for file in (ROOT / "conf" / "router").glob("*.yaml")}
    assert {line.split()[0] for line in listed} == files
    assert all(len(line.split()) > 2 for line in listed)
    assert any(line.startswith("  router: analytical, ") for line in choices(""))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], "usage: graft train"),
        (["--help", "train.steps"], "train.steps: int, default 600."),
        (["--list"], "  engine: deepspeed, megatron, native"),
        (["--list", "engine"], "  native"),
    ],
)
def test_on_the_command_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert told in capsys.readouterr().out


def test_a_choice_that_is_misspelt() -> None:
    with pytest.raises(ConfigError, match=r"router='topkk': .*Did you mean topk\? There are: analytical"):
        compose_config(["+recipe=upcycle", "router=topkk"])
    with pytest.raises(ConfigError, match="router.name='ssrr': .*Did you mean ssr"):
        parse_config(compose_config(["+recipe=upcycle"]) | {"router": {"name": "ssrr"}})
    with pytest.raises(ConfigError, match="engine='xyz': there is no such choice. Choose one of: deepspeed"):
        compose_config(["+recipe=upcycle", "engine=xyz"])

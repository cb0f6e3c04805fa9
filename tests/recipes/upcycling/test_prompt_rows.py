"""Router rows from prompts: what the router reads for them, and what is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from moe.errors import ConfigError
from recipes.config.compose import compose_config
from recipes.config.schema import RunConfig, parse_config
from recipes.config.sections.prompts_config import PromptsConfig
from recipes.data.tokenizer import load_tokenizer
from recipes.jobs.upcycle_job import UpcycleJob
from recipes.models.hf.ffn_blocks import find_ffns
from recipes.models.hf.hf_model import load_model
from recipes.upcycling.convert.folder_check import load_any
from recipes.upcycling.prompts.prompt_file import ExpertPrompts, read_prompts
from recipes.upcycling.prompts.prompt_rows import prompt_rows, with_prompt_rows
from tests.conftest import MakeCheckpoint
from tests.recipes.models.whole_surgery import make_surgery, swap

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = (ExpertPrompts(("the dog", "a fox jumps"), ("return x",)), ExpertPrompts(("def f(x):",)))
Write = Callable[[Any], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of prompts."""

    def dump(content: Any) -> str:
        path = tmp_path / "prompts.yaml"
        path.write_text(json.dumps(content))
        return str(path)

    return dump


def config_of(*overrides: str) -> RunConfig:
    """As train.py composes it."""
    return parse_config(compose_config(["+recipe=upcycle", *overrides]))


@pytest.mark.parametrize("take", ["mean", "last"])
@pytest.mark.parametrize("centre", [False, True])
def test_rows_are_what_the_networks_read(make_checkpoint: MakeCheckpoint, take: Any, centre: bool) -> None:
    """Against hidden states by hand: the norm in front of each network, applied to the stream."""
    model = load_model(make_checkpoint("llama"))
    sites = find_ffns(model.module, model.config)
    rows = prompt_rows(model, sites, TWO, PromptsConfig(take=take, centre=centre, scale=2.0))
    tokenizer = load_tokenizer(model.folder, append_eos=False)

    def seen(text: str, layer: int) -> torch.Tensor:
        block = model.module.model.layers[layer]
        found = []
        handle = block.post_attention_layernorm.register_forward_hook(lambda m, a, out: found.append(out[0]))
        model.module(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
        handle.remove()
        return found[0][-1] if take == "last" else found[0].mean(0)

    with torch.no_grad():
        for site in sites:
            first = (seen("the dog", site.layer) + seen("a fox jumps", site.layer)) / 2
            first = first - seen("return x", site.layer)
            wanted = torch.stack([normalize(first, dim=0), normalize(seen("def f(x):", site.layer), dim=0)])
            wanted = wanted - wanted.mean(0) if centre else wanted
            torch.testing.assert_close(rows[site.layer], 2 * normalize(wanted, dim=-1))


def test_a_mixture_and_its_conversion_begin_with_the_rows(
    make_checkpoint: MakeCheckpoint, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    import tools.upcycle

    dense = make_checkpoint("llama")
    path = write([{"positive_prompts": ["the dog"]}, {"positive_prompts": ["def f(x):"]}])
    config = config_of(f"dense={dense}", "upcycle.num_experts=2", f"prompts.path={path}")
    model = load_model(dense)
    swapped = swap(model, make_surgery(config), statistics=with_prompt_rows({}, config, model))
    rows = {site.layer: layer.router.rows_ED().detach().clone() for site, layer in swapped}
    fresh = load_model(dense)
    expected = prompt_rows(
        fresh, find_ffns(fresh.module, fresh.config), read_prompts(path), PromptsConfig(path)
    )
    for layer, rows_ED in rows.items():
        torch.testing.assert_close(rows_ED, expected[layer])
    out = tmp_path / "moe"
    arguments = ["--dense", str(dense), "--out", str(out), "--experts", "2", "--top-k", "2"]
    monkeypatch.setattr(sys, "argv", ["tool", *arguments, f"prompts.path={path}"])
    assert tools.upcycle.main() == 0
    state = load_any(out).model.state_dict()
    gates = [value for name, value in state.items() if name.endswith("mlp.gate.weight")]
    assert len(gates) == len(rows)
    for gate_ED, rows_ED in zip(gates, rows.values(), strict=True):
        torch.testing.assert_close(gate_ED, rows_ED)


def test_files(write: Write) -> None:
    listed = [{"positive_prompts": ["a"], "negative_prompts": ["b"]}, {"positive_prompts": ["c"]}]
    expected = [ExpertPrompts(("a",), ("b",)), ExpertPrompts(("c",))]
    assert read_prompts(write(listed)) == expected
    # A config of mergekit's.
    assert read_prompts(write({"base_model": "x", "gate_mode": "hidden", "experts": listed})) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "no list of experts"),
        ([], "no list of experts"),
        (["a"], r"prompts.path\[0\]"),
        ([{"positive_prompts": []}], "no row"),
        ([{"positive_prompts": "text"}], "no list of texts"),
        ([{"positive_prompts": ["a"], "negative_prompts": [" "]}], "negative_prompts"),
        ([{"positive_prompts": ["a"]}, {"positive_prompts": ["a"]}], "experts 0 and 1"),
    ],
)
def test_what_is_wrong_with_a_file(write: Write, content: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_prompts(write(content))


def test_mistakes_before_anything_starts(write: Write, tmp_path: Path) -> None:
    def found(*overrides: str) -> list[str]:
        return [str(mistake) for mistake in UpcycleJob().check(config_of(*overrides), 1)]

    path = write([{"positive_prompts": ["a"]}, {"positive_prompts": ["b"]}])
    assert any("Set upcycle.num_experts=2" in line for line in found(f"prompts.path={path}"))
    assert any("cannot be read" in line for line in found(f"prompts.path={tmp_path / 'none'}"))
    two = [f"prompts.path={path}", "upcycle.num_experts=2"]
    assert not found(*two)
    assert any("sets the router's rows" in line for line in found(*two, "upcycle=virtual_group"))
    assert any("router.name='hash'" in line for line in found(*two, "router=hash"))


@pytest.mark.parametrize(
    ("prompts", "centre", "words"),
    [
        ([ExpertPrompts(("the dog",)), ExpertPrompts(("the dog",))], False, "could not part them"),
        ([ExpertPrompts(("the dog",)), ExpertPrompts(("the dog",))], True, "cancel out"),
        ([ExpertPrompts(("the dog",), ("the dog",)), ExpertPrompts(("def f(x):",))], True, "cancel out"),
    ],
)
def test_prompts_that_say_nothing_are_told(
    make_checkpoint: MakeCheckpoint, prompts: list[ExpertPrompts], centre: bool, words: str
) -> None:
    model = load_model(make_checkpoint("llama"))
    with pytest.raises(ConfigError, match=words):
        prompt_rows(model, find_ffns(model.module, model.config), prompts, PromptsConfig(centre=centre))

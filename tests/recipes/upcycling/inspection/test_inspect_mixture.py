"""Inspection of whole mixtures: transformers' own router outputs, experts and tokenizer judge it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import tools.inspect_moe
from moe.errors import ConfigError, ModelError, UserError
from recipes.models.families.open_mixture import open_mixture
from recipes.upcycling.inspection.inspect_page import write_page
from recipes.upcycling.inspection.inspect_table import HEAD, findings, table_rows
from recipes.upcycling.inspection.layer_figures import layer_figures
from recipes.upcycling.inspection.layer_sums import gather_layers
from tests.grid import each
from tests.recipes.jobs.job_runs import write_text
from tests.recipes.models.families.test_families import make, ours, theirs

_TOKENS = torch.randint(0, 96, (6, 20), generator=torch.Generator().manual_seed(3))


def look(folder: Path, batch: int = 4, edit: Any = None) -> list[dict[str, Any]]:
    """The figures of a folder's layers on `_TOKENS`."""
    model = ours(open_mixture(folder))
    if edit is not None:
        edit(model)
    sums = gather_layers(model, _TOKENS, batch, 30)
    ids_U, seen_U = _TOKENS.unique(return_counts=True)
    with torch.no_grad():
        return [layer_figures(i, layer, sums[i], ids_U, seen_U, str, None) for i, layer in model.moe_layers()]


@torch.no_grad()
def test_routing_is_that_of_transformers_router_outputs() -> None:
    """Load, probabilities, entropies, pairs, margins and vocabulary from ``output_router_logits`` alone."""
    folder = make("mixtral")
    given = theirs(folder)(input_ids=_TOKENS, output_router_logits=True, use_cache=False).router_logits
    found = look(folder)
    assert len(found) == len(given) == 3
    for layer, logits_TE in zip(found, given, strict=True):
        probs_TE = functional.softmax(logits_TE.double(), dim=-1)
        best = logits_TE.double().topk(3, dim=-1)
        hits_TE = functional.one_hot(best.indices[:, :2], 8).sum(1)
        assert layer["tokens_by_expert"] == hits_TE.sum(0).tolist()
        assert layer["load"] == pytest.approx((hits_TE.sum(0) / 240).tolist())
        assert layer["max_vio"] == pytest.approx(float(hits_TE.sum(0).max()) / 30 - 1)
        assert layer["mean_probability"] == pytest.approx(probs_TE.mean(0).tolist(), abs=1e-5)
        entropy = float(-(probs_TE * probs_TE.log()).sum(-1).mean() / torch.tensor(8.0).log())
        assert layer["token_entropy"] == pytest.approx(entropy, abs=1e-5)
        assert layer["co_activation"] == (hits_TE.T @ hits_TE).tolist()
        margin_T = best.values[:, 1] - best.values[:, 2]
        assert layer["margin_quantiles"]["50"] == pytest.approx(float(margin_T.sort().values[60]), abs=1e-4)
        for expert, listed in enumerate(layer["favourite_tokens"]):
            for token in listed:
                there_T = _TOKENS.flatten() == token["id"]
                assert token["occurrences"] == int(there_T.sum())
                assert token["routed"] == int(hits_TE[there_T, expert].sum())


def test_figures_do_not_depend_on_the_batch() -> None:
    one, other = look(make("mixtral"), batch=6), look(make("mixtral"), batch=1)
    for a, b in zip(one, other, strict=True):
        assert a["co_activation"] == b["co_activation"] and a["favourite_tokens"] == b["favourite_tokens"]
        assert a["importance_reap"] == pytest.approx(b["importance_reap"], rel=1e-4)
        assert a["output_tokens"] == b["output_tokens"] == 30
        assert a["output_cka"][0] == pytest.approx(b["output_cka"][0], rel=1e-3, abs=1e-3)
        assert a["token_entropy"] == pytest.approx(b["token_entropy"], rel=1e-4)


@torch.no_grad()
def test_twins_and_dead_experts_are_found() -> None:
    """Expert 5 becomes expert 2 with neurons in another order; expert 6 is never chosen."""

    def edit(model: Any) -> None:
        layer = dict(model.moe_layers())[1]
        experts, F = layer.experts, layer.experts.shape[2]
        order = torch.arange(F).roll(1)
        up_UD, down_DF = experts.w_up_EUD[2], experts.w_down_EDF[2]
        experts.w_up_EUD[5] = torch.cat([part[order] for part in up_UD.split(F)])
        experts.w_down_EDF[5] = down_DF[:, order]
        layer.router.register_forward_pre_hook(lambda module, args: (args[0].abs(), *args[1:]))
        next(iter(layer.router.parameters()))[6] = -10

    before, layer, after = look(make("mixtral"), edit=edit)
    # Inputs are made positive, so that a row of -10 is the last of all; other rows may lose always, too.
    dead = [expert for expert, tokens in enumerate(layer["tokens_by_expert"]) if not tokens]
    assert 6 in layer["dead"] == dead and layer["twins"] == [[2, 5]]
    assert layer["aligned"][0]["experts"] == [2, 5] and layer["aligned"][0]["neurons_in_place"] == 0
    assert layer["aligned"][0]["cosine"] == pytest.approx(1) and abs(layer["weight_cosine"][2][5]) < 0.5
    assert layer["co_activation_lift"][6][0] is None and not before["twins"] + after["twins"]
    lines = findings({"tokens": 120, "layers": [layer]})
    assert (
        f"layer 1: {len(dead)} of 8 experts dead: {dead[0]}" in lines[0]
        and "1 of 28 pairs are twins: 2+5" in lines[1]
    )
    row = dict(zip(HEAD, table_rows({"layers": [layer]})[0], strict=True))
    assert (
        row["dead"] == str(len(dead))
        and row["twins"] == "1"
        and row["most alike"] == "1.000"
        and row["from dense"] == "-"
    )


@each("family", ["deepseek_v3", "deepseek_v2", "phimoe", "granitemoe"])
def test_margins_of_routers_that_choose_otherwise(family: str) -> None:
    """Groups, biases and SparseMixer: no left-out candidate is above the last chosen expert."""
    for layer in look(make(family)):
        assert 0 <= layer["margin_quantiles"]["1"] < layer["margin_quantiles"]["99"]
        assert 0 <= layer["near_ties"] < 0.5


def test_the_page(rendered: None, tmp_path: Path) -> None:
    figures = {"model": "<m>", "family": "Mixtral", "tokens": 120, "layers": look(make("mixtral"))}
    text = write_page(tmp_path / "new" / "page", figures).read_text()
    assert text.count("data:image/png;base64,") == 6 and "&lt;m&gt;" in text
    for name in ("load", "likeness", "margins"):
        assert (tmp_path / "new" / "page" / f"{name}.png").read_bytes()[1:4] == b"PNG"


@pytest.fixture
def source(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A mixture with a tokenizer."""
    shutil.copytree(make("mixtral", vocab_size=300), tmp_path / "source")
    shutil.copytree(tokenizer_folder, tmp_path / "source", dirs_exist_ok=True)
    return tmp_path / "source"


def call(monkeypatch: pytest.MonkeyPatch, *given: object) -> int:
    """Runs the command."""
    words = [*map(str, given), "--samples", "4", "--sequence-length", "16"]
    monkeypatch.setattr(sys, "argv", ["inspect", *words])
    return tools.inspect_moe.main()


def test_the_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text")
    assert call(monkeypatch, source, "--text", text, "--json", "-", "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert figures["tokens"] == 64 and [layer["layer"] for layer in figures["layers"]] == [0, 1, 2]
    assert "near ties" in said.err and (tmp_path / "out" / "inspect.html").is_file()
    # Every key that is written is on the page of the docs.
    page = (Path(__file__).parents[4] / "docs" / "inspect.md").read_text()
    assert not [key for key in {*figures, *figures["layers"][0]} if f"`{key}`" not in page]


def test_mistakes_are_sentences(
    source: Path, tmp_path: Path, make_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each before the model is read."""
    monkeypatch.setattr("recipes.upcycling.inspection.inspect_mixture.materialize", pytest.fail)
    text, dense = write_text(tmp_path / "text"), make_checkpoint("llama")

    def refused(words: str, error: type[UserError], *given: object) -> None:
        with pytest.raises(error, match=words):
            call(monkeypatch, *given)

    refused("MODEL=.*no such folder", ConfigError, tmp_path / "nowhere", "--text", text)
    refused("--text", ConfigError, source, "--text", tmp_path / "nowhere.txt")
    refused("mixture|family|dense", ModelError, dense, "--text", text)
    refused("--dense=.*an MoE already", ConfigError, source, "--text", text, "--dense", source)
    wide = make_checkpoint("llama", intermediate_size=64)
    refused(
        "--dense=.*64 wide.*an expert there is 32 by 48", ModelError, source, "--text", text, "--dense", wide
    )
    (tmp_path / "short.txt").write_text("too short")
    refused("--text=.*samples of 16 are wanted", ModelError, source, "--text", tmp_path / "short.txt")
    refused("--out=.*a file", ConfigError, source, "--text", text, "--out", tmp_path / "short.txt")
    small = tmp_path / "small"
    shutil.copytree(make("mixtral"), small)
    shutil.copytree(
        source, small, ignore=lambda at, names: [n for n in names if "token" not in n], dirs_exist_ok=True
    )
    refused("MODEL=.*vocabulary has 96", ModelError, small, "--text", text)


def test_distance_from_the_dense_parent(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_checkpoint: Any
) -> None:
    """A mixture of copies is at 0 from its parent and of twins alone."""
    import tools.upcycle

    dense, moe = make_checkpoint("llama"), tmp_path / "moe"
    words = ["--dense", str(dense), "--out", str(moe), "--experts", "3", "--top-k", "2", "--no-verify"]
    monkeypatch.setattr(sys, "argv", ["upcycle", *words])
    assert tools.upcycle.main() == 0
    text, target = write_text(tmp_path / "text"), tmp_path / "figures.json"
    assert call(monkeypatch, moe, "--text", text, "--dense", dense, "--json", target) == 0
    for layer in json.loads(target.read_text())["layers"]:
        assert layer["distance_from_dense"] == [0, 0, 0]
        # The mean of three is rounded.
        assert layer["distance_from_mean"] == pytest.approx([0, 0, 0], abs=1e-6)
        assert layer["twins"] == [[0, 1], [0, 2], [1, 2]]
        assert all(pair["neurons_in_place"] == 1 for pair in layer["aligned"])

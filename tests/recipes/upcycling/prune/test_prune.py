"""Pruning: transformers' own modules judge the sums, and the source with experts shut out the files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tools.prune
from moe.errors import ConfigError, ModelError
from recipes.models.families.open_mixture import open_mixture
from recipes.upcycling.prune.choose_experts import choose_experts
from recipes.upcycling.prune.criteria import criteria
from recipes.upcycling.prune.pruned_files import require_prunable, write_pruned
from recipes.upcycling.reduce.expert_sums import ExpertSums, gather_sums
from tests.grid import each
from tests.recipes.jobs.job_runs import write_text
from tests.recipes.models.families.test_families import largest_difference, make, ours, stored, theirs

_TOKENS = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(2))
# Of each MoE layer others, so that numbers of layers and of experts cannot be mixed up.
_KEPT = {0: [0, 2, 3, 7], 1: [1, 2, 4, 6], 2: [0, 1, 5, 6]}


def _shut_out(model: Any, family: str) -> None:
    """Has transformers' own routers choose among the kept experts alone."""
    for index, block in enumerate(model.model.layers):
        layer = getattr(block, "block_sparse_moe", None) or block.mlp
        if not hasattr(layer, "experts"):
            continue
        shut = [expert for expert in range(8) if expert not in _KEPT[index]]
        if family == "deepseek_v3":
            layer.gate.e_score_correction_bias[shut] = -1e9
            continue
        router = layer.router if family == "granitemoe" else layer.gate
        bias = torch.zeros(8)
        if family == "ernie4_5_moe":
            bias = router.moe_statics.e_score_correction_bias[0].clone()
            bias[shut] = -1e9
        router.forward = _masked(router.weight, shut, bias)


def _masked(weight: Tensor, shut: list[int], bias: Tensor) -> Any:
    """A softmax without the shut experts, the two best with the bias, divided by their sum.

    That is Mixtral's rule and Granite's, in other words, and with a bias Ernie's.
    """

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(x.reshape(-1, x.shape[-1]), weight)
        logits[:, shut] = -torch.inf
        scores = logits.softmax(-1)
        ids = (scores + bias).topk(2, dim=-1).indices
        best = scores.gather(-1, ids)
        return logits, best / best.sum(-1, keepdim=True), ids

    return forward


@each("family", ["mixtral", "granitemoe", "ernie4_5_moe", "deepseek_v3"])
def test_a_pruned_mixture_is_its_source_with_experts_shut_out(family: str, tmp_path: Path) -> None:
    folder = make(family, n_group=2, topk_group=2) if family == "deepseek_v3" else make(family)
    mixture = open_mixture(folder)
    kept = {moe.index: _KEPT[moe.index] for moe in mixture.spec.moe_blocks}
    require_prunable(mixture, 4)
    write_pruned(mixture, kept, tmp_path / "pruned")
    reference = theirs(folder)
    with torch.no_grad():
        _shut_out(reference, family)
        want = reference(input_ids=_TOKENS, use_cache=False).logits
        got = theirs(tmp_path / "pruned")(input_ids=_TOKENS, use_cache=False).logits
    assert largest_difference(want, got) < 1e-5
    before, after = stored(folder), stored(tmp_path / "pruned")
    apart = ("expert", "gate", "router", "linear", "statics")
    untouched = [name for name in after if not any(word in name for word in apart)]
    assert untouched and all(torch.equal(before[name], after[name]) for name in untouched)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert 4 in (
        config.get("num_local_experts"),
        config.get("n_routed_experts"),
        config.get("moe_num_experts"),
    )


def test_all_experts_kept_is_the_source_bit_for_bit(tmp_path: Path) -> None:
    folder = make("qwen2_moe")
    write_pruned(open_mixture(folder), {1: list(range(8))}, tmp_path / "same")
    before, after = stored(folder), stored(tmp_path / "same")
    assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())


@torch.no_grad()
def test_sums_are_those_of_transformers_own_experts() -> None:
    """Each expert is asked for its output alone, with weight 1, of the tokens that the gate sends to it."""
    folder = make("olmoe")
    sums = gather_sums(ours(open_mixture(folder)), iter([_TOKENS[:2], _TOKENS[2:]]))
    reference, seen = theirs(folder), {}
    for index, block in enumerate(reference.model.layers):
        keep = lambda module, args, out, at=index: seen.update({at: (args[0].clone(), out)})  # noqa: E731
        block.mlp.gate.register_forward_hook(keep)
    reference(input_ids=_TOKENS, use_cache=False)
    for index, block in enumerate(reference.model.layers):
        x_TD, (_, weights_TK, ids_TK) = seen[index]
        for expert in range(8):
            rows, slots = (ids_TK == expert).nonzero(as_tuple=True)
            ones, ids = torch.ones(len(rows), 1), torch.full((len(rows), 1), expert)
            norms = block.mlp.experts(x_TD[rows], ids, ones).norm(dim=-1)
            found = sums[index]
            assert found.counts_E[expert] == len(rows)
            assert float(found.norms_E[expert]) == pytest.approx(float(norms.sum()), rel=1e-5)
            weighted = float((norms * weights_TK[rows, slots]).sum())
            assert float(found.weighted_E[expert]) == pytest.approx(weighted, rel=1e-5, abs=1e-9)


def test_criteria_by_hand() -> None:
    """Four experts: one used often and weak, one rare and strong, one in between, one never."""
    rows = (torch.tensor(row).double() for row in ([10, 1, 4, 0], [10, 6, 8, 0], [5, 3, 6, 0]))
    sums = ExpertSums(*rows, torch.ones(4), torch.eye(4))
    draw = torch.Generator().manual_seed(0)
    best = {
        name: criterion.scores_E(sums, draw).topk(2).indices.tolist()
        for name, criterion in criteria().items()
    }
    # Means of weighted norms: 0.5, 3, 1.5, 0. Sums of norms: 10, 6, 8, 0.
    assert best["reap"] == [1, 2] and best["ean"] == [0, 2] and best["usage"] == [0, 2]
    assert set(best) == {"reap", "ean", "usage", "random"}


def test_groups_keep_the_same_number_each() -> None:
    """Groups of four; all of the best scores are in the first."""
    mixture = open_mixture(make("deepseek_v3", n_group=2, topk_group=2))
    counts = torch.tensor([9, 8, 7, 6, 1, 2, 3, 4]).double()
    sums = {
        moe.index: ExpertSums(counts, counts, counts, counts, torch.eye(8)) for moe in mixture.spec.moe_blocks
    }
    kept = choose_experts(mixture.spec.moe_blocks, sums, criteria()["usage"], 4, seed=0)
    assert kept == {1: [0, 1, 6, 7], 2: [0, 1, 6, 7]}


@each(
    "keep, words",
    [(9, "there are 8"), (1, "a token uses 2"), (6, "multiple of 4"), (4, "multiple of 4, 8 or more")],
)
def test_numbers_that_the_class_cannot_have_are_refused(keep: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        require_prunable(open_mixture(make("deepseek_v3")), keep)


def test_routers_without_rows_are_refused() -> None:
    mixture = open_mixture(make("olmoe"))
    mixture.spec.moe_blocks[0].router.register_buffer("tree", torch.zeros(3))
    with pytest.raises(ModelError, match="no row for each expert"):
        require_prunable(mixture, 4)


def test_the_command(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Writes, compares, and says what it costs; mistakes are sentences."""
    shutil.copytree(make("mixtral", vocab_size=300), tmp_path / "source")
    shutil.copytree(tokenizer_folder, tmp_path / "source", dirs_exist_ok=True)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    text, out = write_text(tmp_path / "text"), str(tmp_path / "out")
    given = [
        str(tmp_path / "source"),
        "--text",
        text,
        "--out",
        out,
        "--samples",
        "4",
        "--sequence-length",
        "16",
    ]

    def call(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["prune", *given, *more])
        return tools.prune.main()

    with pytest.raises(ConfigError, match="--keep='1': a token uses 2|--keep=1: a token uses 2"):
        call("--keep", "1")
    assert not Path(out).exists()
    assert call("--keep", "4", "--json", "-") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["experts"] == 4 and all(len(row) == 4 for row in figures["kept"].values())
    assert figures["loss_after"] != figures["loss_before"] and 0 < figures["share_of_choices"]["0"] < 1
    assert open_mixture(Path(out)).spec.moe_blocks[0].num_experts == 4
    assert (Path(out) / "tokenizer.json").exists()
    with pytest.raises(ConfigError, match="exists"):
        call("--keep", "4")

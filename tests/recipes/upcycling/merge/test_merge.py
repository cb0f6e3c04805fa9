"""Merging: means by plain arithmetic over the files, and transformers' own class of copies, judge."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tools.merge
from moe.errors import ConfigError
from recipes.models.families.open_mixture import open_mixture
from recipes.upcycling.merge.merge_mixture import group_experts
from recipes.upcycling.merge.methods import merge_methods
from recipes.upcycling.reduce.expert_sums import ExpertSums
from tests.grid import each
from tests.recipes.jobs.job_runs import write_text
from tests.recipes.models.families.test_families import largest_difference, make, stored, theirs

_TOKENS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(2))


def _source(folder: Path, family: str, tokenizer: Path, *, copies: bool) -> Path:
    """A mixture with a tokenizer, of whose experts all are the first if they are copies."""
    shutil.copytree(make(family, vocab_size=300), folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    if copies:
        tensors = stored(folder)
        for name, tensor in tensors.items():
            if family == "granitemoe" and "_linear.weight" in name:
                tensors[name] = tensor[:1].expand_as(tensor).contiguous()
            elif ".experts." in name:
                block, rest = name.split(".experts.")
                tensors[name] = tensors[f"{block}.experts.0.{rest.split('.', 1)[1]}"].clone()
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@each(
    "family, copies, method",
    [
        ("mixtral", True, "msmoe"),
        ("granitemoe", True, "frequency"),
        ("mixtral", False, "frequency"),
        ("granitemoe", False, "frequency"),
    ],
)
def test_the_command(
    family: str,
    copies: bool,
    method: str,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Copies under weights that sum to 1 compute what they did, whatever rows stay; else means are plain."""
    source = _source(tmp_path / "source", family, tokenizer_folder, copies=copies)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    text, out = write_text(tmp_path / "text"), tmp_path / "out"
    words = [str(source), "--text", text, "--out", str(out), "--samples", "4", "--method", method]

    def call(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["merge", *words, "--sequence-length", "16", *more])
        return tools.merge.main()

    with pytest.raises(ConfigError, match="a token uses 2.*graft densify"):
        call("--keep", "1")
    assert call("--keep", "2", "--json", "-") == 0
    figures = json.loads(capsys.readouterr().out)
    assert open_mixture(out).spec.moe_blocks[0].num_experts == figures["experts"] == 2
    assert all(sorted(sum(groups, [])) == list(range(8)) for groups in figures["groups"].values())
    before, after = stored(source), stored(out)
    row = "block_sparse_moe." + ("gate.weight" if family == "mixtral" else "router.layer.weight")
    for index, groups in figures["groups"].items():
        stay = [group[0] for group in groups]
        name = f"model.layers.{index}.{row}"
        assert stay == sorted(stay) and torch.equal(after[name], before[name][stay])
    if copies:
        assert set(figures["residual"].values()) == {0.0}
        with torch.no_grad():
            want, got = (theirs(at)(input_ids=_TOKENS, use_cache=False).logits for at in (source, out))
        assert largest_difference(want, got) < 1e-5
    else:
        assert figures["residual"] == figures["residual_in_order"]
        _require_means(family, figures["groups"]["0"], before, after)


def _require_means(
    family: str, groups: list[list[int]], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> None:
    """A merged matrix is a mean of its members' with one set of shares: solved for, they sum to 1."""
    at = "model.layers.0.block_sparse_moe"
    for place, group in enumerate(groups):
        if family == "mixtral":
            members = torch.stack([before[f"{at}.experts.{e}.w2.weight"] for e in group])
            made = after[f"{at}.experts.{place}.w2.weight"]
        else:
            members, made = before[f"{at}.output_linear.weight"][group], after[f"{at}.output_linear.weight"]
            made = made[place]
        columns = members.flatten(1).T.double()
        shares = torch.linalg.lstsq(columns, made.flatten().double()[:, None]).solution
        assert largest_difference(made.flatten().double(), (columns @ shares).flatten()) < 1e-5
        assert float(shares.sum()) == pytest.approx(1, abs=1e-4) and bool((shares > -1e-4).all())


def test_groups_by_hand() -> None:
    """Experts 2 and 5 are used most; logits of 0, 1 and 3 are like those of 5, the rest like those of 2."""
    counts = torch.tensor([1, 1, 9, 1, 0, 8, 0, 0]).double()
    sides = torch.tensor([[0, 1], [0, 1], [1, 0], [0.1, 2], [1, 0], [0, 1], [3, 0.1], [1, 0]]).double()
    blocks = open_mixture(make("mixtral")).spec.moe_blocks
    sums = {moe.index: ExpertSums(counts, counts, counts, counts, sides @ sides.T) for moe in blocks}
    groups = group_experts(blocks, sums, merge_methods()["msmoe"], 2)
    assert all(found == {2: [2, 4, 6, 7], 5: [5, 0, 1, 3]} for found in groups.values())

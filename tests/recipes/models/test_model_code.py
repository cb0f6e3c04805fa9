"""Models that bring their own code: with trust it comes with the export and runs, else it never does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tools.verify
from moe.errors import ConfigError, ModelError
from recipes.data.tokenizer import check_tokenizer
from recipes.models.export import choose_exporter
from recipes.models.export.companions import check_companions, copy_companions
from recipes.models.export.graft_format import load_graft
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import export, verify_export
from recipes.models.hf.hf_model import load_model
from recipes.models.hf.inspection import check_checkpoint
from recipes.upcycling.convert.folder_check import load_any
from tests.conftest import MakeCheckpoint
from tests.recipes.models.test_exporters import assert_same_logits, some_tokens, trained_model

pytestmark = pytest.mark.usefixtures("one_thread")

_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .louder import louder

class OwnConfig(LlamaConfig):
    model_type = "{family}"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = louder(out.logits)
        return out
"""


def own_checkpoint(plain: Path, folder: Path, family: str) -> Path:
    """A Llama whose own code doubles its logits, with a file that the code imports."""
    shutil.copytree(plain, folder)
    (folder / "modeling_own.py").write_text(_CODE.format(family=family))
    (folder / "louder.py").write_text("def louder(x):\n    return x * 2\n")
    content = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    content |= {"model_type": family, "auto_map": classes, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


# A family of its own, and one whose name transformers has: plain Mixtral would not double the logits.
@pytest.fixture(params=["own_model", "llama"])
def own(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """The checkpoint."""
    return own_checkpoint(make_checkpoint("llama"), tmp_path / "own", request.param)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_a_file_far_too_large_is_not_copied(
    name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_checkpoint("llama"), tmp_path / "dense")
    (folder / name).unlink(missing_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(1 << 42)  # takes no room
    (mistake,) = check_companions(str(folder))
    assert f"its {name} holds 4398046511104 bytes, far more than such a file has" in str(mistake)
    with pytest.raises(ModelError, match="far more than such a file has"):
        copy_companions(folder, tmp_path)
    assert not (tmp_path / name).exists()
    found = check_tokenizer(folder)
    assert bool(found) is (name != "generation_config.json") and all(
        "4398046511104" in str(one) for one in found
    )


def test_trusted_code_comes_with_the_export(
    own: Path,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    auto_classes: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = load_model(make_checkpoint("llama")).module(input_ids=some_tokens()).logits
    dense = load_any(own, trust_remote_code=True)(input_ids=some_tokens()).logits
    torch.testing.assert_close(dense, 2 * plain)
    model = trained_model(own, trust_remote_code=True)
    exporter, reasons = choose_exporter(describe_model(model))
    assert exporter.name == "graft"
    assert "code of its own" in reasons[0] or "in a model of own_model" in reasons[0]
    folder = tmp_path / "hf"
    export(model, exporter, model.module.state_dict().items(), folder, torch.float32, writes=True)
    assert {"modeling_own.py", "louder.py"} <= {path.name for path in folder.iterdir()}
    assert str(tmp_path) not in (folder / "config.json").read_text()
    with torch.no_grad():
        logits = model.module(input_ids=some_tokens()).logits
    for memory in (0, 1e9):
        verify_export(exporter, folder, some_tokens(), logits, memory, trust_remote_code=True)
    assert_same_logits(load_graft(folder, trust_remote_code=True).module, model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert_same_logits(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_logits(load_graft(tmp_path / "again", trust_remote_code=True).module, model)
    for load in (load_graft, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ModelError, match=r"own code \(auto_map.* set trust_remote_code=True"):
            load(folder)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "verify",
            f"--dense={folder}",
            f"--moe={folder}",
            "--trust-remote-code",
            "--samples=1",
            "--sequence-length=8",
        ],
    )
    assert tools.verify.main() == 0


def test_without_trust_a_sentence_says_so(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_checkpoint(make_checkpoint("llama"), tmp_path / "own", "own_model")
    (mistake,) = check_checkpoint(str(own), "--moe")
    assert "it brings its own code" in mistake.rule and mistake.remedy.endswith("set --trust-remote-code.")
    (own / "config.json").write_text(
        json.dumps({"model_type": "graft_moe", "dense_config": json.loads((own / "config.json").read_text())})
    )
    (mistake,) = check_checkpoint(str(own), "--moe")
    assert "it brings its own code" in mistake.rule
    monkeypatch.setattr(sys, "argv", ["verify", f"--dense={own}", f"--moe={own}"])
    with pytest.raises(ConfigError, match="it brings its own code"):
        tools.verify.main()


def test_code_that_is_a_link_out_of_the_folder_is_not_copied(own: Path, tmp_path: Path) -> None:
    (own / "louder.py").rename(tmp_path / "elsewhere.py")
    (own / "louder.py").symlink_to(tmp_path / "elsewhere.py")
    assert check_companions(str(own)) == []  # nobody has trusted it, so that nobody copies it
    (mistake,) = check_companions(str(own), code=True)
    assert "louder.py is a link out of the folder" in mistake.rule

"""What a user may get wrong, and what is said about it: at once, a line each, before anything is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import recipes.config.compose
import recipes.jobs.session
from recipes.launch import main
from tests.conftest import MakeCheckpoint
from tests.grid import each
from tests.paths import ROOT
from tests.patience import patience

UPCYCLE = "+recipe=upcycle"
Change = Callable[[Path], None]


class Command:
    """Runs commands in-process up to where the run would begin.

    Attributes:
        checkpoint: A good one, that may be damaged.
        outputs: The folder that nothing may be written to.
        began: Whether every check was passed.
        lines: What was said about mistakes, without "error: ".
    """

    def __init__(self, folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.checkpoint = checkpoint
        self.outputs = folder / "outputs"
        self.began = False
        self.lines: list[str] = []
        self._capsys = capsys

    def run(self, *arguments: str, dense: bool = True) -> int:
        """Gives the exit code."""
        given = [f"output_dir={self.outputs}", "data.seq_len=32"]
        if not any("recipe" in argument for argument in arguments):
            given.append(UPCYCLE)
        if dense:
            given.append(f"dense={self.checkpoint}")
        code = main([*given, *arguments])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in out + err
        assert not self.outputs.exists(), "something was written"
        self.lines = err.splitlines()
        if code:
            assert out == ""
            assert all(re.fullmatch(r"error: (?s:.+)=(?s:.*): .+\. .*[.?].*", line) for line in self.lines), (
                err
            )
        self.lines = [line.removeprefix("error: ") for line in self.lines]
        return code


@pytest.fixture
def command(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """A command on a copy of a good checkpoint."""
    built = Command(tmp_path, shutil.copytree(make_checkpoint("llama"), tmp_path / "dense"), capsys)

    def begin(*arguments: Any) -> int:
        built.began = True
        return 0

    monkeypatch.setattr(recipes.jobs.session, "run_job", begin)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return built


def set_config(**values: Any) -> Change:
    """Changes ``config.json``; None deletes a key."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def write(name: str, content: str | bytes) -> Change:
    """Writes a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def remove(name: str) -> Change:
    """Deletes what matches."""
    return lambda folder: [path.unlink() for path in folder.glob(name)] and None


def cut(share: float) -> Change:
    """Truncates the weights."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return change


def with_index(*files: Any) -> Change:
    """Adds an index that names files, the first of them the real one."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        names = ["model-00001-of-00002.safetensors", *files]
        index = {"weight_map": {f"tensor.{i}": name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def without_a_map(folder: Path) -> None:
    """An index that maps nothing."""
    with_index()(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def only_bin(folder: Path) -> None:
    """Weights as a pickle."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Change, str]] = {
    "no config": (remove("config.json"), "there is no config.json in it. Give a checkpoint in Hugging Face"),
    "broken JSON": (write("config.json", '{"a": '), "its config.json is not JSON (Expecting value"),
    "not text": (write("config.json", b"\xff\xfe\x00"), "its config.json is not UTF-8 ("),
    "a JSON list": (write("config.json", "[]"), "its config.json is not a JSON object. Download it again."),
    "no model_type": (
        set_config(model_type=None),
        "its config.json names no model_type. Give a transformers",
    ),
    "an encoder": (
        set_config(model_type="bert", architectures=["BertForMaskedLM"]),
        "this is not a decoder-only language model but BertForMaskedLM. Give a causal language model",
    ),
    "encoder-decoder": (
        set_config(model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True),
        "this is not a decoder-only language model but T5ForConditionalGeneration",
    ),
    "a mixture": (
        set_config(model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=8),
        "this model is an MoE already (num_local_experts=8). Give a dense checkpoint, or train "
        "this one on by +recipe=continue.",
    ),
    "a mixture, DeepSeek's key": (set_config(n_routed_experts=64), "already (n_routed_experts=64)"),
    "code of its own": (
        set_config(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"}),
        "it brings its own code (auto_map in config.json). If you have read and trust that code, set",
    ),
    "sizes that do not fit": (set_config(num_attention_heads=7), "transformers cannot use its config.json ("),
    "numbers that give none": (
        set_config(rms_norm_eps=-1.0),
        "with its config.json even small weights give logits that are not finite. Correct it (rms_norm_eps",
    ),
    "angles that are none": (
        set_config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "with its config.json even small weights give logits that are not finite. Correct it",
    ),
    "a pickle": (
        only_bin,
        "no *.safetensors file: there are pytorch_model.bin, which are pickles. Save it with",
    ),
    "no weights": (remove("*.safetensors"), "no *.safetensors file: it holds no weights. Save it with"),
    "truncated": (cut(0.5), "model.safetensors is corrupt or cut short ("),
    "cut in the header": (cut(0.001), "model.safetensors is corrupt or cut short ("),
    "empty": (cut(0), "model.safetensors is corrupt or cut short ("),
    "garbage": (write("model.safetensors", os.urandom(4096)), "model.safetensors is corrupt or cut short ("),
    "a missing shard": (
        with_index("model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors, named in model.safetensors.index.json, is missing. Download it.",
    ),
    "out of the folder": (
        with_index("../../etc/secrets.safetensors"),
        "names '../../etc/secrets.safetensors', which is not a plain file name. Download",
    ),
    "an absolute name": (with_index("/etc/passwd"), "names '/etc/passwd', which is not a plain file name."),
    "the folder above": (with_index(".."), "names '..', which is not a plain file name"),
    "no name": (with_index(7), "model.safetensors.index.json"),
    "a broken index": (
        without_a_map,
        "model.safetensors.index.json has no weight_map. Download the checkpoint again.",
    ),
    "no tokenizer": (remove("tokenizer.json"), "holds no tokenizer. Copy its files there (tokenizer.json"),
    "a damaged tokenizer": (write("tokenizer.json", "{}"), "holds a tokenizer that cannot be read ("),
    "another tokenizer": (
        set_config(vocab_size=100),
        "the model's vocabulary has 100 entries. Use the tokenizer that the model was trained with.",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_dense_folder_that_cannot_be_used(command: Command, case: str) -> None:
    change, expected = DAMAGES[case]
    change(command.checkpoint)
    assert command.run() == 2
    assert not command.began
    (line,) = command.lines
    assert line.startswith(f"dense='{command.checkpoint}': ")
    assert expected in line


def test_a_good_command_begins(command: Command) -> None:
    assert command.run() == 0
    assert command.began
    with_index()(command.checkpoint)
    assert command.run("trust_remote_code=true") == 0


def test_code_that_is_trusted_is_no_mistake(command: Command) -> None:
    set_config(auto_map={"AutoModelForCausalLM": "modeling.Mine"})(command.checkpoint)
    assert command.run("trust_remote_code=true") == 0


def test_a_model_with_code_of_its_own_is_not_built_by_megatron(command: Command) -> None:
    set_config(auto_map={"AutoModelForCausalLM": "modeling.Mine"})(command.checkpoint)
    code = "from transformers import LlamaForCausalLM\nclass Mine(LlamaForCausalLM):\n    pass\n"
    (command.checkpoint / "modeling.py").write_text(code)
    assert command.run("engine=megatron", "trust_remote_code=true") == 2
    assert any("by code of its own, and Megatron builds models itself" in line for line in command.lines)


def test_dense_is_no_folder(command: Command) -> None:
    assert command.run("dense=/no/such/folder") == 2
    assert command.lines == [
        "dense='/no/such/folder': the folder does not exist. Give the path of a local checkpoint folder."
    ]
    file = command.checkpoint / "config.json"
    assert command.run(f"dense={file}") == 2
    assert command.lines == [
        f"dense='{file}': this is a file, not a folder. Give the folder that holds config.json."
    ]


# Arguments, and what each of the lines must be or (ending in "...") begin with.
ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "a typing error": (
        ["router.tpo_k=3"],
        ["router.tpo_k='3': there is no such option. Did you mean router.top_k?"],
    ),
    "a typing error in an option of another choice": (
        ["router.capasity_factor=3"],
        [
            "router.capasity_factor='3': there is no such option. Did you mean router.capacity_factor? It is "
            "an option of router=skywork, and this run has router=topk. Set router=skywork to use it, or ..."
        ],
    ),
    "the section forgotten": (
        ["top_k=3"],
        ["top_k='3': there is no such option. Did you mean router.top_k?"],
    ),
    "nothing near": (
        ["xyzzy=3"],
        ["xyzzy='3': there is no such option. Run graft train --cfg to see them all."],
    ),
    "the old name of a schedule": (
        ["sparsify=[{until:0.5,top_k:4}]"],
        [
            "sparsify='[{until:0.5,top_k:4}]': the option is now called top_k_schedule. "
            "Write top_k_schedule=[{until:0.5,top_k:4}]."
        ],
    ),
    "the old name of a section": (
        ["versus.arms=all", "+versus.batches=[1]"],
        [
            "versus.arms='all': the option is now called upcycle_vs_cpt.arms. Write upcycle_vs_cpt.arms=all.",
            "versus.batches='[1]': the option is now called upcycle_vs_cpt.batches. Write "
            "+upcycle_vs_cpt.batches=[1].",
        ],
    ),
    "the name of no section": (["+sections={}"], ["sections={}: there is no such option. Run graft ..."]),
    "appended": (["+data.foo=3"], ["data.foo=3: there is no such option. Run graft train ..."]),
    "no such choice": (
        ["router=nope"],
        ["router='nope': there is no such choice. Choose one of: analytical, avg_k, ..."],
    ),
    "a list for a choice": (
        ["router=[1,2]"],
        ["router='[1,2]': there is no such choice. Choose one of: analytical, avg_k, ..."],
    ),
    "truth values for numbers and the reverse": (
        ["seed=true", "trust_remote_code=1", "train.async_save=0"],
        [
            "data.seed=True: this must be a number. Correct the value.",
            "seed=True: this must be a number. Correct the value.",
            "trust_remote_code=1: this must be true or false. Correct the value.",
            "train.async_save=0: this must be true or false. Correct the value.",
        ],
    ),
    "no folder": (["cache_dir=''"], ["cache_dir='': is empty. Name a folder: . is the present one."]),
    "null for a choice": (
        ["router=null"],
        ["router='null': there is no such choice. Choose one of: analytical, avg_k, ..."],
    ),
    "no such recipe": (
        ["+recipe=upcyle"],
        [
            "recipe='upcyle': there is no such choice. Did you mean upcycle? There are: continue, "
            "llama_moe_v2, pretrain, quick, real, upcycle, upcycle_vs_cpt."
        ],
    ),
    "no plus": (["recipe=upcycle"], ["recipe='upcycle': it is chosen with a plus. Write +recipe=upcycle."]),
    "no such job": (
        ["job=foo"],
        ["job='foo': there is no such job. Choose one of: continue, pretrain, ..."],
    ),
    "no such flag": (
        ["--resume"],
        ["command line='--resume': there is no such flag. See graft train --help."],
    ),
    "no value": (["data.seq_len"], ["command line='data.seq_len': this sets nothing. Write OPTION=VALUE."]),
    "an equals sign": (
        ["data.path=/a=b.txt"],
        ["data.path='/a=b.txt': it holds characters that have a meaning of their own. Quote it, with the..."],
    ),
    "a comma": (
        ["data.path=/a.txt,/b.txt"],
        [
            "data.path='/a.txt,/b.txt': a comma outside of a list. Quote it, with the shell's quotes "
            "outside: 'data.path=\"/a.txt,/b.txt\"', write a list: 'data.path=[/a.txt,/b.txt]', or add -m "
            "for a run of each."
        ],
    ),
    "an unknown reference": (
        ["data.path=${foo}"],
        ["data.path='${foo}': Interpolation key 'foo' not found..."],
    ),
    "a word for a number": (
        ["router.top_k=many"],
        ["router.top_k='many': this must be a valid integer. Correct the value."],
    ),
    "a number for a word": (
        ["run.name=7"],
        [
            "run.name=7: this must be a valid string. Quote it, with the shell's quotes outside: "
            "'run.name=\"7\"'."
        ],
    ),
    "one of several types": (
        ["compare.cpt=maybe"],
        ["compare.cpt='maybe': this must be a valid boolean or 'auto'. Correct the value."],
    ),
    "within a list": (
        ["upcycle.layers=[0,a]"],
        ["upcycle.layers.1='a': this must be a valid integer. Correct the value."],
    ),
    "a value of two": (
        ["optim.betas=[0.9,1.5]"],
        ["optim.betas=(0.9, 1.5): must be two numbers in [0, 1). (0.9, 0.95) is usual."],
    ),
    "not one of these": (
        ["router.score=tanh"],
        ["router.score='tanh': this must be 'softmax' or 'sigmoid'. Correct the value."],
    ),
    "a section taken away": (
        ["~router"],
        ["router=None: the section must hold a name. Set router.name. Choose one of: ..."],
    ),
    "too many experts a token": (
        ["router.top_k=9"],
        [
            "router.top_k=9: a token cannot use more experts than the 8 of upcycle.num_experts. "
            "Set router.top_k to 8 or less, or raise upcycle.num_experts."
        ],
    ),
    "a weight that is always 1": (
        ["router.top_k=1"],
        [
            "router.top_k=1: the only weight is then always 1, and the router gets no gradient from the "
            "loss. Set router.renormalise=false with router.order=score_then_topk, or top_k to 2 or more."
        ],
    ),
    "one expert": (
        ["upcycle.num_experts=1"],
        ["upcycle.num_experts=1: a mixture has at least two experts. ..."],
    ),
    "layers in no form": (
        ["upcycle.layers=odd"],
        ["upcycle.layers='odd': is none of the known forms. Use all, every:N, ..."],
    ),
    "a layer twice": (
        ["upcycle.layers=[1,1]"],
        ["upcycle.layers=[1, 1]: the list is empty or names a layer..."],
    ),
    "layers beyond the depth": (
        ["upcycle.layers=[0,3]"],
        ["upcycle.layers=[0, 3]: layers [3] do not exist, the model has layers 0 to 2. Use all, ..."],
    ),
    "more layers than there are": (
        ["upcycle.layers=last:4"],
        ["upcycle.layers='last:4': last:4 asks for more than the model's 3 layers. Use all, ..."],
    ),
    "no data": (
        ["data.path=/no/such.txt"],
        ["data.path='/no/such.txt': does not exist. Check the name; rela..."],
    ),
    "an empty glob": (
        ["data.path=/no/*.txt"],
        ["data.path='/no/*.txt': matches no file. Check the pattern; ..."],
    ),
    "longer than the context": (
        ["data.seq_len=65"],
        ["data.seq_len=65: the model takes 64 tokens at most. Set 64 or less."],
    ),
    "a batch that does not divide": (
        ["train.global_batch_size=10", "train.micro_batch_size=4"],
        [
            "train.global_batch_size=10: it is no multiple of train.micro_batch_size=4 times 1 ranks. Set a "
            "multiple of 4."
        ],
    ),
    "a warm-up that does not fit": (
        ["train.steps=10", "optim.schedule.warmup_steps=20"],
        ["optim.schedule.warmup_steps=20: ..."],
    ),
    "a name that is a path": (
        ["run.name=../x"],
        ["run.name='../x': must be a plain name. Choose its place by output_dir."],
    ),
    "nothing to resume": (
        ["resume=/no/run"],
        ["resume='/no/run': there is no such directory. Give a run directory, one of its checkpoints..."],
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_wrong_argument(command: Command, case: str) -> None:
    arguments, expected = ARGUMENTS[case]
    assert command.run(*arguments) == 2
    assert not command.began
    assert_lines(command.lines, expected)


def assert_lines(lines: list[str], expected: list[str]) -> None:
    """Each line is as expected, or begins so where "..." follows."""
    assert len(lines) == len(expected), "\n".join(lines)
    for line, wanted in zip(lines, expected, strict=True):
        begins = wanted.removesuffix("...")
        assert line.startswith(begins) if begins != wanted else line == wanted, line


def test_the_default_model_has_rules_too(command: Command) -> None:
    arguments = ["model.vocab_size=100", "model.num_heads=3", "data.path=/no/such.txt"]
    assert command.run(*arguments, dense=False) == 2
    assert_lines(
        command.lines,
        [
            "model.vocab_size=100: must be at least 257, for all bytes and the end token. Raise it.",
            "model.num_heads=3: does not divide hidden_size=128. Choose a divisor.",
            "model.num_kv_heads=4: does not divide num_heads=3. Choose a divisor.",
            "data.path='/no/such.txt': does not exist. ...",
        ],
    )
    assert command.run("model.hidden_size=36", dense=False) == 2
    assert_lines(
        command.lines, ["model.num_heads=4: makes heads of 9, and rotary embeddings need an even..."]
    )
    arguments = ["upcycle.layers=last:5", "model.steps=10", "model.warmup_steps=40"]
    assert command.run(*arguments, dense=False) == 2
    assert_lines(command.lines, ["upcycle.layers='last:5': ...", "model.warmup_steps=40: ..."])


def test_tokenised_data_has_no_text_for_the_default_model(command: Command, tmp_path: Path) -> None:
    (tmp_path / "pair.bin").touch()
    assert command.run(f"data.path={tmp_path / 'pair'}", dense=False) == 2
    assert_lines(command.lines, [f"data.path='{tmp_path / 'pair'}': lacks pair.idx. ..."])


def test_an_output_dir_that_is_a_file(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert command.run(f"output_dir={file}/below") == 2
    assert_lines(command.lines, [f"output_dir='{file}/below': {file} is a file. Give another folder."])


def test_a_run_of_this_name_exists(command: Command, tmp_path: Path) -> None:
    used = tmp_path / "used"
    (used / "mine").mkdir(parents=True)
    (used / "mine" / "run.json").write_text("{}", encoding="utf-8")
    assert command.run(f"output_dir={used}", "run.name=mine") == 2
    assert_lines(
        command.lines, [f"run.name='mine': {used / 'mine'} holds a run already. Set resume=auto ..."]
    )
    # The other ranks of a machine do not look, as rank 0 may be making the folder already.
    assert command.run(f"output_dir={used}", "run.name=mine", "resume=auto") == 0


def test_ranks_count(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert command.run() == 2
    assert_lines(
        command.lines,
        ["train.global_batch_size=16: it does not divide over 3 ranks. Set a multiple of 3."],
    )


def test_no_recipe(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job=null"]) == 2
    assert capsys.readouterr().err == (
        "error: recipe=None: no recipe is chosen. Add +recipe=NAME, one of: continue, llama_moe_v2, "
        "pretrain, quick, real, upcycle, upcycle_vs_cpt.\n"
    )


def test_all_mistakes_are_told_at_once(command: Command, tmp_path: Path) -> None:
    only_bin(command.checkpoint)
    set_config(num_experts=4)(command.checkpoint)
    arguments = [
        "data.path=/no/such.txt",
        "data.validation_path=/no/*.txt",
        "router.top_k=9",
        "train.steps=10",
        "optim.schedule.warmup_steps=20",
    ]
    assert command.run(*arguments, "train.micro_batch_size=3") == 2
    told = {line.partition("=")[0] for line in command.lines}
    assert told == {
        "train.global_batch_size",
        "router.top_k",
        "optim.schedule.warmup_steps",
        "data.path",
        "data.validation_path",
        "dense",
    }
    assert sum(line.startswith("dense=") for line in command.lines) == 2


def test_mistakes_of_form_do_not_hide_each_other(command: Command) -> None:
    assert command.run("router=nope", "router.tpo_k=1", "data.seqlen=5", "train.stepz", "run.name=a,b") == 2
    told = [line.split(": ")[0] for line in command.lines]
    assert told == ["command line='train.stepz'", "run.name='a,b'", "router='nope'", "data.seqlen='5'"]


def test_mistakes_of_names_do_not_hide_those_of_values_and_files(command: Command) -> None:
    names = ["router=nope", "router.tpo_k=1", "train.stepz=3", "upcycle.name=copyy", "experts.backend=nope"]
    values = ["train.steps=-1", "optim.name=sgd", "attention=moe", "attention.router.name=nope", "dense=/no"]
    assert command.run(*names, *values, "data.path=/none.txt") == 2
    told = [line.split(": ")[0].replace("'", "") for line in command.lines]
    paths = ["router=nope", "train.stepz=3", "upcycle.name=copyy", "attention.router.name=nope"]
    paths += ["optim.name=sgd", "experts.backend=nope", "train.steps=-1", "data.path=/none.txt", "dense=/no"]
    assert told == paths


def test_mistakes_of_type_do_not_hide_missing_files(command: Command) -> None:
    arguments = ["router.top_k=x", "train.steps=-1", "engine.threads=0", "dense=/no", "data.path=/none.txt"]
    assert command.run(*arguments) == 2
    told = [line.partition("=")[0] for line in command.lines]
    assert told == ["router.top_k", "engine.threads", "train.steps", "data.path", "dense"]


def test_a_folder_whose_name_is_an_option_does_not_confuse(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # hydra's message names the folder of conf.
    moved = shutil.copytree(recipes.config.compose.CONF, tmp_path / "seed" / "conf")
    monkeypatch.setattr(recipes.config.compose, "CONF", moved)
    assert command.run("seed=1", "data=nope") == 2
    assert_lines(command.lines, ["data='nope': there is no such choice. Choose one of: chat, stdlib."])


def test_a_package_of_the_name_of_ours_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.18.3" if name == "kernels" else version(name))
    assert command.run("data.seq_len=32") == 2
    assert_lines(
        command.lines, ["kernels='0.18.3': this package of PyPI has the name of Graft's own, and..."]
    )


def test_torchrun_is_told(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert command.run("router.top_k=9", "dense=/no") == 2
    message = json.loads(file.read_text())
    assert message["message"].splitlines() == command.lines
    assert set(message) == {"message", "timestamp"}


def test_cfg_shows_and_ends(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([UPCYCLE, "--cfg", "router.top_k=3"]) == 0
    assert re.search(r"^router:\n  name: topk\n  top_k: 3$", capsys.readouterr().out, re.MULTILINE)
    assert not command.began
    assert main([UPCYCLE, "--cfg", "router.top_k=0"]) == 2


def test_help_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for option in ("+recipe=upcycle", "dense=", "data.path=", "resume=auto", "--cfg"):
        assert option in out


def test_a_full_disk_is_said_in_a_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*arguments: Any) -> int:
        raise OSError(28, "No space left on device", "/scratch/x")

    monkeypatch.setattr(recipes.jobs.session, "run_job", fill)
    assert main([UPCYCLE, f"dense={command.checkpoint}", "data.seq_len=32"]) == 2
    assert capsys.readouterr().err == (
        "error: no space left on the disk for /scratch/x. Free some, or set output_dir and cache_dir.\n"
    )


def test_an_interrupt_ends_quietly(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes.jobs.session, "run_job", interrupt)
    assert main([UPCYCLE, f"dense={command.checkpoint}", "data.seq_len=32"]) == 130
    assert capsys.readouterr().err == "interrupted: whatever checkpoints there are, are complete\n"


def test_our_own_bugs_are_not_hidden(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*arguments: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(recipes.jobs.session, "run_job", break_down)
    with pytest.raises(PermissionError):
        main([UPCYCLE, f"dense={command.checkpoint}", "data.seq_len=32"])


def test_the_command_itself(tmp_path: Path) -> None:
    arguments = [UPCYCLE, "dense=/no/such/folder", f"output_dir={tmp_path / 'outputs'}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=patience(300),
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: dense='/no/such/folder': the folder does not exist. Give the path of a local checkpoint "
        "folder.\n"
    )
    assert not list(tmp_path.iterdir())


@each(
    "given, owners",
    [
        ("engine.zero_stage=1", "an option of engine=deepspeed, and this run has engine=native"),
        ("+engine.zero_stage=1", "an option of engine=deepspeed. Set engine=deepspeed to use it"),
        ("optim.muon.momentum=0.5", "an option of optim=muon, and this run has optim=adamw"),
        ("router.bias_stop_step=4", "an option of router=deepseek_v2 and router=deepseek_v3, and"),
        ("upcycle.noise_std=1 upcycle=random", "an option of upcycle=copy and upcycle=drop, and this run"),
        ("attention.scale_factor=2", "an option of attention=moe"),
        ("router.num_expert=4", "there is no such option. Did you mean"),
    ],
)
def test_an_option_of_another_choice_says_whose_it_is(command: Command, given: str, owners: str) -> None:
    assert command.run(*given.split(), dense=False) == 2
    assert len(command.lines) == 1 and owners in command.lines[0]

"""A GGUF file becomes a folder of transformers; the package gguf writes it here, and dequantises it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moe.errors import ModelError
from recipes.models.hf.gguf_file import import_gguf

_WORDS = ["<s>", "</s>", *(chr(c) for c in range(97, 123)), "Ġ", "ab", "Ġab"]
_HEADS, _KV_HEADS = 4, 2


def _model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp rotates them: pairs side by side, and not half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _names(layer: int) -> dict[str, str]:
    ours = f"model.layers.{layer}."
    theirs = f"blk.{layer}."
    return {
        f"{ours}self_attn.q_proj": f"{theirs}attn_q",
        f"{ours}self_attn.k_proj": f"{theirs}attn_k",
        f"{ours}self_attn.v_proj": f"{theirs}attn_v",
        f"{ours}self_attn.o_proj": f"{theirs}attn_output",
        f"{ours}mlp.gate_proj": f"{theirs}ffn_gate",
        f"{ours}mlp.up_proj": f"{theirs}ffn_up",
        f"{ours}mlp.down_proj": f"{theirs}ffn_down",
        f"{ours}input_layernorm": f"{theirs}attn_norm",
        f"{ours}post_attention_layernorm": f"{theirs}ffn_norm",
    }


def _write(path: Path, model: Any) -> dict[str, torch.Tensor]:
    """Writes a model with matrices in Q8_0; returns what the file says, under transformers' names."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_vocab_size(len(_WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(_WORDS)
    writer.add_token_types([3, 3] + [1] * (len(_WORDS) - 2))
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= _names(0) | _names(1)
    said = {}
    for name, tensor in model.state_dict().items():
        theirs = names[name.removesuffix(".weight")] + ".weight"
        heads = {"attn_q": _HEADS, "attn_k": _KV_HEADS}.get(theirs.split(".")[-2])
        array = tensor.numpy()
        if array.ndim == 1:
            writer.add_tensor(theirs, array)
            said[name] = tensor
            continue
        quantised = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
        said[name] = torch.from_numpy(gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0))
        stored = quantised if heads is None else _interleaved(quantised, heads)
        writer.add_tensor(theirs, stored, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return said


def test_weights_config_and_tokenizer_are_those_of_the_file(tmp_path: Path) -> None:
    model, file, out = _model(), tmp_path / "tiny.gguf", tmp_path / "tiny"
    said = _write(file, model)
    found = import_gguf(file, out)
    assert found.formats == {"F32": 5, "Q8_0": 16} and found.changed == 0.0 and not found.has_template
    again = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert {name: torch.equal(x, said[name]) for name, x in again.state_dict().items()} == dict.fromkeys(
        said, True
    )
    assert again.dtype == torch.float32 and not hasattr(again.config, "quantization_config")
    # In fp32 the file says 9.999999747378752e-06.
    assert again.config.rms_norm_eps == 1e-5 and again.config.rope_parameters["rope_theta"] == 500.0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab ab c")["input_ids"]) == ["ab", "Ġab", "Ġ", "c"]
    ids = torch.tensor([[2, 3, 4, 5]])
    model.load_state_dict(said)
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_another_dtype_rounds_and_says_how_much(tmp_path: Path) -> None:
    said = _write(tmp_path / "tiny.gguf", _model())
    found = import_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny", torch.bfloat16)
    rounded = sum(int((x != x.bfloat16().float()).sum()) for x in said.values())
    assert found.changed == pytest.approx(rounded / sum(x.numel() for x in said.values()))
    assert "of the weights are rounded" in found.lines()[1]


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        (b"", "does not begin as a GGUF file does"),
        (b"GGUF", "cannot find the tensors"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 64, "cannot find the tensors"),
    ],
)
def test_what_is_no_gguf_file_is_refused_and_leaves_nothing(
    content: bytes, clause: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=clause):
        import_gguf(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    with pytest.raises(ModelError, match="no such file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "tiny.gguf", _model())
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot find the tensors"):
        import_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()

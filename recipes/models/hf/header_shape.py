"""The shape of a checkpoint's feed-forward networks, by config and headers alone: milliseconds, no model.

It is for mistakes that shall show early. What is not recognised here is left to the surgery, which sees the
network itself.

Letters: D model width, F width of a feed-forward network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe.upcycle.layer_plan import FFNShape
from recipes.models.hf.inspection import read_config, weight_files

# Names of the down projections of transformers' families, with those of the gates beside them.
_GATES: Mapping[str, tuple[str, ...]] = {
    "down_proj": ("gate_proj", "gate_up_proj"),
    "w2": ("w1",),
    "wo": ("wi_0",),
    "c_proj": (),
    "dense_4h_to_h": (),
    "fc2": (),
    "fc_out": (),
}
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")
_DOWN = re.compile(rf"(?P<site>.*\.0\..*)\.(?P<down>{'|'.join(_GATES)})\.weight")


def read_ffn_shape(folder: Path) -> FFNShape | None:
    """The shape of the first block's network; None where names or widths are of no known family.

    Args:
        folder: A checkpoint that `recipes.models.hf.inspection.check_dense` has found nothing wrong with.
    """
    config = read_config(folder)
    text = config.get("text_config") or config
    width = next((text[key] for key in _WIDTHS if isinstance(text.get(key), int)), None)
    shapes = _shapes(folder)
    found = [match for match in map(_DOWN.fullmatch, shapes) if match and "attn" not in match["site"]]
    if width is None or len(found) != 1:
        return None
    site, down = found[0]["site"], found[0]["down"]
    rows, columns = shapes[found[0][0]]
    if width not in (rows, columns):
        return None
    return FFNShape(
        width=columns if rows == width else rows,
        model_width=width,
        gated=any(f"{site}.{gate}.weight" in shapes for gate in _GATES[down]),
        activation=next((text[key] for key in _ACTIVATIONS if isinstance(text.get(key), str)), ""),
        up_bias=any(re.fullmatch(rf"{re.escape(site)}\.(?!{down}).*\.bias", name) for name in shapes),
        down_bias=f"{site}.{down}.bias" in shapes,
    )


def _shapes(folder: Path) -> dict[str, Any]:
    found = {}
    for file in weight_files(folder):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if ".0." in name:
                    found[name] = tensors.get_slice(name).get_shape()
    return found

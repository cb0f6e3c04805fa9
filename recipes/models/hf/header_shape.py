"""Shape of a checkpoint's feed-forward networks, read from config and headers without a model.

It finds mistakes early. A family that is not recognised here is left to the surgery, which sees the network.

Letters: D model width, F width of a feed-forward network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moe.upcycle.dense_shape import FFNShape
from recipes.models.hf.config_file import read_config
from recipes.models.hf.weight_files import weight_files

# Names of the down projection in transformers' families, each with the names of its gate projection.
_GATES: Mapping[str, tuple[str, ...]] = {
    "down_proj": ("gate_proj", "gate_up_proj"),
    "w2": ("w1",),
    "wo": ("wi_0",),
    "c_proj": (),
    "dense_4h_to_h": (),
    "fc2": (),
    "fc_out": (),
}
#: Keys of config.json for the activation, in the order in which they are read.
ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function", "activation")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_DOWN = re.compile(rf"(?P<site>.*\.0\..*)\.(?P<down>{'|'.join(_GATES)})\.weight")


def read_ffn_shape(folder: Path) -> FFNShape | None:
    """Reads the shape of the first block's network; None if names or widths are of no known family.

    Args:
        folder: A checkpoint that has passed `recipes.models.hf.inspection.check_dense`.
    """
    config = read_config(folder)
    text = config.get("text_config") or config
    width = next((text[key] for key in _WIDTHS if isinstance(text.get(key), int)), None)
    try:
        shapes = _first_block_shapes(folder)
    except SafetensorError:
        return None
    found = [match for match in map(_DOWN.fullmatch, shapes) if match and "attn" not in match["site"]]
    if width is None or len(found) != 1:
        return None
    site, down = found[0]["site"], found[0]["down"]
    rows, columns = shapes[found[0][0]]
    if width not in (rows, columns):
        return None
    # Where two keys disagree, the class decides which it reads.
    named = {text[key] for key in ACTIVATION_KEYS if isinstance(text.get(key), str)}
    return FFNShape(
        width=columns if rows == width else rows,
        model_width=width,
        gated=any(f"{site}.{gate}.weight" in shapes for gate in _GATES[down]),
        activation=named.pop() if len(named) == 1 else "",
        up_bias=any(re.fullmatch(rf"{re.escape(site)}\.(?!{down}).*\.bias", name) for name in shapes),
        down_bias=f"{site}.{down}.bias" in shapes,
    )


def _first_block_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="numpy") as opened:
            first = [name for name in opened.keys() if ".0." in name]  # noqa: SIM118
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in first}
    return shapes

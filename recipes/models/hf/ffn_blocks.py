"""Finds the feed-forward network in every block of a decoder, whatever its family.

A network is recognised by the names of its linear layers, or by their shapes if the names are unknown. It is
then compared with the module itself on random input, so that a network that does more than
``down(act(gate(x)) * up(x))`` is rejected by name and never silently changed.

Letters: T tokens, D model width, F width of the network.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.activations import ACTIVATIONS, activation_unsupported_reason
from moe.errors import FieldError, ModelError
from moe.experts.weights import FFNWeights
from recipes.models.hf.declared_config import DeclaredConfig
from recipes.models.hf.header_shape import ACTIVATION_KEYS

if TYPE_CHECKING:
    from moe.upcycle.configs import UpcycleConfig
    from recipes.models.hf.hf_model import HFModel

# (gate, up, down) by the names that the families of transformers use; gate None: not gated;
# gate == up: one matrix holds the gate rows first, then the up rows.
_KNOWN_NAMES: tuple[tuple[str | None, str, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen2/3, Gemma, OLMo(2), StableLM, Cohere
    ("gate_up_proj", "gate_up_proj", "down_proj"),  # Phi-3, GLM-4
    ("w1", "w3", "w2"),  # Meta's own names
    ("wi_0", "wi_1", "wo"),  # T5-style gated
    (None, "c_fc", "c_proj"),  # GPT-2 (Conv1D), GPT-BigCode, Starcoder2
    (None, "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon
    (None, "fc1", "fc2"),  # Phi
    (None, "fc_in", "fc_out"),  # GPT-J, CodeGen
    (None, "up_proj", "down_proj"),  # Nemotron, Arcee
)
# Largest difference due to another order of summation, relative to the largest output.
_RECOGNITION_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 0.05,
    torch.float16: 0.02,
}


@dataclass(frozen=True)
class FFNSite:
    """One feed-forward network of a model.

    Attributes:
        layer: Index of the block.
        name: Module path, as in ``model.get_submodule(name)``.
        weights: Its weights; views of the model's parameters, not copies.
    """

    layer: int
    name: str
    weights: FFNWeights

    def replace(self, model: nn.Module, module: nn.Module) -> None:
        """Replaces it by another module."""
        parent, _, child = self.name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def find_ffns(model: nn.Module, config: Any, *, verify: bool = True) -> list[FFNSite]:
    """Finds the feed-forward network of each block, in order.

    Args:
        model: A decoder of transformers.
        config: Its config, for the number of layers and the name of the activation.
        verify: Whether to compare outputs with those of the module; False for a model without weights.

    Raises:
        ModelError: Blocks or networks are not recognised, or a network computes something else.
    """
    prefix, blocks = _blocks(model, config)
    found = [_ffn_of_block(block, f"{prefix}.{layer}", config) for layer, block in enumerate(blocks)]
    activation = activation_of(config)
    sites = []
    for layer, (name, ffn) in enumerate(found):
        weights = _read(ffn, activation)
        if reason := activation_unsupported_reason(activation, weights.gate_FD is not None):
            raise _unsupported(config, reason, "Correct the config's activation.")
        if verify:
            _verify(ffn, weights, f"{prefix}.{layer}.{name}", config)
        sites.append(FFNSite(layer, f"{prefix}.{layer}.{name}", weights))
    return sites


def chosen_sites(model: HFModel, config: UpcycleConfig) -> list[FFNSite]:
    """Returns the feed-forward networks that ``upcycle.layers`` chooses.

    Raises:
        ConfigError: The choice names layers that the model does not have.
        ModelError: The model's networks are not recognised.
    """
    sites = find_ffns(model.module, model.config)
    try:
        return [sites[i] for i in config.layer_choice.pick(len(sites))]
    except FieldError as error:
        raise error.under("upcycle") from error


def _unsupported(config: Any, rule: str, remedy: str) -> ModelError:
    return ModelError.one("dense", getattr(config, "model_type", type(config).__name__), rule, remedy)


def _blocks(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    depth = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        rule = f"no list of {depth} decoder blocks is found in {type(model).__name__}"
        raise _unsupported(config, rule, "Open an issue that names the model; this family is not supported.")
    return lists[0]


def decoder_blocks(model: nn.Module, config: Any) -> nn.ModuleList:
    """Returns the list of a decoder's blocks.

    Raises:
        ModelError: No list of modules has the config's depth.
    """
    return _blocks(model, config)[1]


def activation_of(config: Any) -> str:
    for key in ACTIVATION_KEYS:
        value = getattr(DeclaredConfig(config), key, None)
        if isinstance(value, str):
            if value not in ACTIVATIONS:
                rule = f"its activation {key}={value!r} is unknown"
                raise _unsupported(config, rule, f"Known are: {', '.join(ACTIVATIONS)}.")
            return value
    raise _unsupported(config, "its config names no activation", f"Set one of {', '.join(ACTIVATION_KEYS)}.")


def is_conv1d(module: nn.Module) -> bool:
    """Returns True for GPT-2's linear layer, which stores its weight as ``[in, out]``."""
    return type(module).__name__ == "Conv1D"


def linear_names(network: nn.Module) -> tuple[str | None, str, str]:
    """Returns the names of gate, up and down among a network's linear layers.

    Gate is None if the network is not gated, and equals up if one matrix holds both.
    """
    names = _match(network)
    assert names is not None, network
    return names


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if _is_linear(child)}


def _candidates(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in block.named_modules():
        attention = any("attn" in part or "attention" in part for part in name.split("."))
        if name and not attention and _match(module) is not None:
            yield name, module


def _match(module: nn.Module) -> tuple[str | None, str, str] | None:
    """Returns the names of (gate, up, down) among a module's own linear layers, if it has them."""
    linears = _linears(module)
    for known in _KNOWN_NAMES:
        if set(linears) == {name for name in known if name is not None}:
            return known
    return _match_by_shape(linears)


def _match_by_shape(linears: dict[str, nn.Module]) -> tuple[str | None, str, str] | None:
    shapes = {name: tuple(_weight(linear).shape) for name, linear in linears.items()}
    for down, (D, F) in shapes.items():
        ups = [name for name in shapes if name != down]
        if F <= D or not all(shapes[name] == (F, D) for name in ups):
            continue
        if len(ups) == 1:
            return None, ups[0], down
        if len(ups) == 2:
            gates = [name for name in ups if "gate" in name or name.endswith("1")]
            if len(gates) == 1:
                return gates[0], next(name for name in ups if name != gates[0]), down
    return None


def _ffn_of_block(block: nn.Module, where: str, config: Any) -> tuple[str, nn.Module]:
    found = list(_candidates(block))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        rule = f"one feed-forward network is expected in {where} ({type(block).__name__}), found: {names}"
        raise _unsupported(config, rule, "Open an issue that names the model; this family is not supported.")
    name, ffn = found[0]
    required = [
        parameter.name
        for parameter in inspect.signature(ffn.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) != 1:
        rule = (
            f"{where}.{name} takes {', '.join(required)} where a plain feed-forward network takes one input"
        )
        raise _unsupported(
            config, rule, "This family adds its residual inside the network and is not supported."
        )
    return name, ffn


def _weight(linear: nn.Module) -> Tensor:
    """Returns the weight as ``[out, in]``, whichever way the layer stores it."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.t() if is_conv1d(linear) else weight


def _read(ffn: nn.Module, activation: str) -> FFNWeights:
    gate, up, down = linear_names(ffn)
    linears = _linears(ffn)
    up_FD, b_up = _weight(linears[up]), linears[up].bias
    gate_FD = b_gate = None
    if gate is not None and gate == up:
        gate_FD, up_FD = up_FD.chunk(2)
        if b_up is not None:
            b_gate, b_up = b_up.chunk(2)  # type: ignore[operator]
    elif gate is not None:
        gate_FD, b_gate = _weight(linears[gate]), linears[gate].bias
    return FFNWeights(
        up_FD=up_FD.detach(),
        down_DF=_weight(linears[down]).detach(),
        activation=activation,
        gate_FD=None if gate_FD is None else gate_FD.detach(),
        b_gate_F=_detached(b_gate),
        b_up_F=_detached(b_up),
        b_down_D=_detached(linears[down].bias),
    )


def _detached(bias: Any) -> Tensor | None:
    return None if bias is None else bias.detach()


def dense_ffn(x_TD: Tensor, weights: FFNWeights) -> Tensor:
    """Computes the network that the weights describe, in plain torch: ``[T, D] -> [T, D]``."""
    act = ACTIVATIONS[weights.activation]
    hidden_TF = nn.functional.linear(x_TD, weights.up_FD, weights.b_up_F)
    if weights.gate_FD is not None:
        hidden_TF = act.hidden(nn.functional.linear(x_TD, weights.gate_FD, weights.b_gate_F), hidden_TF)
    else:
        hidden_TF = act.forward(hidden_TF)
    return nn.functional.linear(hidden_TF, weights.down_DF, weights.b_down_D)


@torch.no_grad()
def _verify(ffn: nn.Module, weights: FFNWeights, where: str, config: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype, device = weights.up_FD.dtype, weights.up_FD.device
    x_TD = torch.randn(8, weights.model_width, generator=generator).to(device=device, dtype=dtype)
    training = ffn.training
    ffn.eval()
    theirs, ours = ffn(x_TD[None])[0], dense_ffn(x_TD, weights)
    ffn.train(training)
    error = float((theirs - ours).abs().max() / theirs.abs().max().clamp_min(1e-30))
    if not error <= _RECOGNITION_TOLERANCE[dtype]:
        rule = (
            f"{where} ({type(ffn).__name__}) computes something else than a feed-forward network with "
            f"activation {weights.activation!r}: outputs differ by {error:.1e} of the largest"
        )
        raise _unsupported(config, rule, "Open an issue that names the model; this family is not supported.")

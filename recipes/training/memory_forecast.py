"""Foresees what a rank will hold in training, from the model's shapes alone, before any of it is there.

Weights, gradients and optimizer state are exact; the rest is what the passes of a transformers decoder were
measured to keep (docs/faults.md has the errors).

Letters: T tokens of a micro-batch, D model width, F network width, K experts a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from moe.layer import MoELayer
from recipes.engines.optim.optimizer import state_elements
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.token_losses import rows_at_once

if TYPE_CHECKING:
    from recipes.engines.base import HeldShares
    from recipes.engines.optim.config import OptimConfig
    from recipes.models.hf.hf_model import HFModel

# Tensors of width D that a block keeps a token, beside what its matrices read and write.
_WIDTHS = 6
_FP32 = 4
# Bytes that a CPU's heap keeps for each element of a gathered layer: what is freed and taken anew, in other
# sizes each time, leaves holes; and the most of them, as glibc maps blocks of 32 MiB and more by themselves.
# Measured at 16 to 137 M parameters, in fp32 and bf16, on 1 and 2 ranks.
_HOLES, _MOST_HOLES = 16, 0.32 * 2**30
# Log-probabilities, and their gradient before and behind the softmax.
_LOGIT_COPIES = 3


@dataclass(frozen=True)
class Passes:
    """Passes of a step on one rank.

    Attributes:
        tokens: T.
        compute_size: Bytes per element of products.
        recomputes: Whether a block keeps only its input.
        accumulates: Whether gradients of earlier micro-batches are there while one is computed.
        device: Type of the device; on a CPU the experts keep less.
    """

    tokens: int
    compute_size: int
    recomputes: bool
    accumulates: bool
    device: str


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that a rank will hold, beside what it holds before the model.

    Attributes:
        weights: Master weights.
        gradients: Their gradients, and copies that the engine keeps of them or of weights.
        optimizer: State of the optimizer.
        activations: Activations of a micro-batch.
        logits: Logits and their gradients.
        buffers: Gathered layers and buffers of the communication; on a CPU with what the heap keeps of them.
        accumulates: Whether gradients are there while the activations are. In the backward pass of an only
            micro-batch they come as these go.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    accumulates: bool

    @property
    def fixed(self) -> float:
        """Bytes that no choice of the micro-batch changes."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Largest sum of parts that are there at once."""
        passing = self.activations + self.logits
        most = self.gradients + passing if self.accumulates else max(self.gradients, passing)
        return self.weights + self.optimizer + self.buffers + most

    def parts(self) -> str:
        """Returns the parts in words."""
        return ", ".join(
            f"{name} {gib(getattr(self, name))}"
            for name in ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
        )


def gib(size: float) -> str:
    """Returns bytes in GiB, with two digits."""
    return f"{size / 2**30:.2f}"


def forecast(model: HFModel, optim: OptimConfig, shares: HeldShares, passes: Passes) -> MemoryForecast:
    """Foresees the memory of one rank.

    Args:
        model: The model before it is sharded; it needs no memory.
        optim: Settings of the optimizer.
        shares: The engine's shares of a rank.
        passes: The passes of a step.
    """
    experts = {id(p) for _, layer in model.moe_layers() for p in layer.experts.parameters()}
    params = list(model.module.parameters())
    trained = [p for p in params if p.requires_grad]
    weights = _FP32 * shares.of(shares.weights, _sizes(params, experts))
    gradients = _FP32 * shares.of(shares.gradients, _sizes(trained, experts))
    state = _FP32 * shares.of(shares.optimizer, state_elements(model.module, optim, experts))
    copies = _FP32 * shares.of(shares.copies, _sizes(trained, experts))
    blocks = decoder_blocks(model.module, model.config)
    kept = [_kept_bytes(block, model.config.get_text_config().hidden_size, passes) for block in blocks]
    if passes.recomputes:
        width = model.config.get_text_config().hidden_size
        kept = [passes.tokens * passes.compute_size * width * len(kept), max(kept, default=0.0)]
    text = model.config.get_text_config()
    logits = _logit_bytes(text.vocab_size, text.hidden_size, passes)
    gathered = _gathered(model.module, blocks, experts, shares)
    # They lie between activations that stay.
    most = min(_MOST_HOLES, 2 * sum(kept))
    holes = min(_HOLES * gathered, most) if passes.device == "cpu" else 0.0
    buffers = gathered * (passes.compute_size + _FP32) + holes
    return MemoryForecast(weights, gradients + copies, state, sum(kept), logits, buffers, passes.accumulates)


def _logit_bytes(vocabulary: int, width: int, passes: Passes) -> float:
    """Returns the bytes of the logits that exist at once, and of the head's gradient that a part makes."""
    at_once = min(passes.tokens, rows_at_once(vocabulary, width))
    logits = at_once * vocabulary * (_LOGIT_COPIES * _FP32 + passes.compute_size % _FP32)
    return logits + (vocabulary * width * _FP32 if at_once < passes.tokens else 0)


def _sizes(params: Iterable[nn.Parameter], experts: set[int]) -> tuple[int, int]:
    """Returns the elements outside and inside the routed experts."""
    found = [0, 0]
    for param in params:
        found[id(param) in experts] += param.numel()
    return found[0], found[1]


def _gathered(module: nn.Module, blocks: Iterable[nn.Module], experts: set[int], shares: HeldShares) -> float:
    """Returns the elements that are whole on a rank at once: two blocks, and what is in none of them."""
    if not shares.gathers:
        return 0.0
    in_blocks = [_sizes(block.parameters(), experts) for block in blocks]
    rest = sum(p.numel() for p in module.parameters()) - sum(map(sum, in_blocks))
    largest = max((dense + routed / shares.expert_ranks for dense, routed in in_blocks), default=0.0)
    return rest + 2 * largest


def _kept_bytes(block: nn.Module, width: int, passes: Passes) -> float:
    """Returns the bytes that a block keeps for its backward pass: what its matrices read or write."""
    layers = [module for module in block.modules() if isinstance(module, MoELayer)]
    routed = {id(p) for layer in layers for p in layer.experts.parameters()}
    matrices = [max(p.shape) for p in block.parameters() if p.ndim == 2 and id(p) not in routed]
    # A gated network keeps its activation beside gate, up and their product.
    wide = sum(matrices) + max(matrices, default=0)
    wide += sum(_expert_elements(layer, width, passes.device) for layer in layers)
    return passes.tokens * (_WIDTHS * width * _FP32 + wide * passes.compute_size)


def _expert_elements(layer: MoELayer, width: int, device: str) -> float:
    _, _, inner = layer.experts.shape
    pre_activations = inner * (2 if layer.experts.gated else 1)
    if device == "cpu":  # its kernels compute the rest again
        return layer.router.top_k * pre_activations
    return layer.router.top_k * (pre_activations + 2 * inner + 2 * width)


def free_device_bytes(device: torch.device, free_main: int) -> int:
    """Returns what is free for a rank on its device: of a GPU, or of main memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_main

"""Routing by a known property of each token: its modality, class, or timestep. Nothing is learned.

Sources: Mixture-of-Transformers (arXiv 2411.04996: one feed-forward network for each modality, positions
gathered by masks that partition the sequence), and MoEs that split a sample space by label or diffusion
timestep.

With ``key: token_ids`` the ids of the batch are the key, and ranges of ids the modalities. In early-fusion
models, whose vocabulary has a range of image tokens, the id alone tells a token's modality, in training and
in generation. For any other key the caller sets ``RouterContext.keys[name]`` before each forward pass, to one
of

- ``[B, S]`` integers: the expert of each token;
- ``[B]``: the same for all tokens of a sequence;
- ``[E, B, S]`` bool: a mask for each expert, which together hold every token once;
- ``[B, S]`` or ``[B]`` numbers, with ``edges``: a token goes to the first expert whose upper edge is above
  its number.

Letters: T tokens, E experts, B sequences, S tokens a sequence.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from moe.errors import ConfigError
from moe.routers.base import Router
from moe.routers.configs.keyed_config import TOKEN_IDS, KeyedConfig
from moe.types import LayerContext, Routing


class KeyedRouter(Router[KeyedConfig]):
    """Router to the one expert that the caller's key names, with weight 1, without parameters or gradient."""

    name = "keyed"
    config_class = KeyedConfig
    host_syncs = "once a pass, to learn whether every key names an expert"
    compile_unsupported_reason = (
        "the host raises an error if a key names no expert. Compile the experts alone"
    )

    @property
    def weights_sum_to_one(self) -> bool:
        """True: the one weight is 1."""
        return True

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Does nothing: there are no parameters."""
        return

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Looks the tokens' experts up.

        Raises:
            ConfigError: The caller gave no such key, one of another batch, or one that names no expert.
        """
        T = len(x_TD)
        mask_T = ctx.token_mask_T(T)
        experts_T = self._experts(self._key(ctx), T, mask_T).to(x_TD.device)
        wrong_T = (experts_T < 0) | (experts_T >= self.num_experts)
        if mask_T is not None:
            # Padding may have any key.
            experts_T, wrong_T = experts_T.masked_fill(wrong_T & ~mask_T, 0), wrong_T & mask_T
        if bool(wrong_T.any()):
            value = experts_T[wrong_T][0].item()
            raise self._error(f"a token has key {value}, and experts are 0 to {self.num_experts - 1}")
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_T1 = torch.ones(T, 1, dtype=dtype, device=x_TD.device)
        return Routing(expert_ids_TK=experts_T[:, None], weights_TK=weights_T1, num_experts=self.num_experts)

    def _key(self, ctx: LayerContext) -> Tensor:
        name, keys = self.config.key, ctx.run.keys
        if name == TOKEN_IDS:
            if ctx.run.token_ids is None:
                raise self._error("the model was given embeddings, and no ids", "Call it with input_ids.")
            return ctx.run.token_ids
        if name not in keys:
            given = ", ".join(sorted(keys)) or "none"
            raise self._error(f"it routes by this key of each token, and the caller gave only: {given}")
        return keys[name]

    def _experts(self, key: Tensor, num_tokens: int, mask_T: Tensor | None) -> Tensor:
        """Returns the ``[T]`` int64 expert of each token."""
        shape, is_mask = tuple(key.shape), key.dtype == torch.bool
        if is_mask:
            if shape[0] != self.num_experts or key[0].numel() != num_tokens:
                raise self._error(f"masks are {shape}: not one of {num_tokens} tokens for each expert")
            masks_ET = key.reshape(self.num_experts, -1)
            holders_T = masks_ET.sum(0)
            broken_T = holders_T != 1 if mask_T is None else (holders_T != 1) & mask_T.to(key.device)
            if bool(broken_T.any()):
                place = int(broken_T.nonzero()[0])
                raise self._error(f"token {place} is in {int(holders_T[place])} masks, and not in one")
            return masks_ET.to(torch.int8).argmax(0)
        if key.dim() == 1 and len(key) and num_tokens % len(key) == 0:
            key = key.repeat_interleave(num_tokens // len(key))
        if key.numel() != num_tokens:
            raise self._error(f"the key is {shape}, and there are {num_tokens} tokens")
        key = key.reshape(-1)
        if self.config.edges:
            edges = torch.tensor(self.config.edges, dtype=torch.float64, device=key.device)
            range_T = torch.bucketize(key.double(), edges, right=True)
            if not self.config.experts:
                return range_T
            return torch.tensor(self.config.experts, device=key.device)[range_T]
        if key.is_floating_point():
            raise self._error("the key is a number that is not whole, and there are no edges")
        return key.to(torch.int64)

    def _error(self, rule: str, remedy: str | None = None) -> ConfigError:
        key = self.config.key
        otherwise = f"Set RouterContext.keys[{key!r}] before every forward pass: see moe/routers/keyed.py."
        return ConfigError.one("router.key", key, rule, remedy or otherwise)

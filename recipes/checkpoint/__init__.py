"""Training checkpoints: written atomically by all ranks, verified, loaded by any number of ranks.

A checkpoint is a folder ``step-<n>``::

    rank-00000.safetensors   what rank 0 wrote: ``global/<name>#<i>`` boxes and ``rank/<name>`` tensors
    index.json               for every global name its dtype, shape, and which rank wrote which box of it
    state.json               the caller's JSON state
    manifest.json            format, step, world size, size and CRC-32 of every other file; written last

Every function here is collective: with an initialised process group all ranks of the group call it.
"""

from recipes.checkpoint.reader import Loaded, load_checkpoint
from recipes.checkpoint.retention import Retention
from recipes.checkpoint.saver import Saver
from recipes.checkpoint.search import Found, find_checkpoint, verify_checkpoint
from recipes.checkpoint.shard_layout import (
    FlatShard,
    GlobalTensor,
    LocalBlocks,
    LocalShard,
    global_shape,
    local_memory,
)
from recipes.checkpoint.space import checkpoint_bytes, require_space
from recipes.checkpoint.writer import save_checkpoint

__all__ = [
    "FlatShard",
    "Found",
    "GlobalTensor",
    "Loaded",
    "Retention",
    "Saver",
    "LocalBlocks",
    "LocalShard",
    "checkpoint_bytes",
    "find_checkpoint",
    "global_shape",
    "load_checkpoint",
    "local_memory",
    "require_space",
    "save_checkpoint",
    "verify_checkpoint",
]

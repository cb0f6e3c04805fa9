"""Training checkpoints: written atomically by all ranks, verified, loaded by any number of ranks."""

from recipes.checkpoint.inventory import (
    Found,
    Retention,
    checkpoint_bytes,
    find_checkpoint,
    require_space,
    verify_checkpoint,
)
from recipes.checkpoint.reader import Loaded, load_checkpoint
from recipes.checkpoint.saver import Saver
from recipes.checkpoint.shard_layout import (
    FlatShard,
    GlobalTensor,
    LocalBlocks,
    LocalShard,
    global_shape,
    local_memory,
)
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

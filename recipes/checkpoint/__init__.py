"""Training checkpoints: written atomically by all ranks, verified, loaded by any number of ranks."""

from recipes.checkpoint.inventory import (
    Found,
    Retention,
    checkpoint_bytes,
    find_checkpoint,
    own_checkpoints,
    require_space,
    retain,
    verify_checkpoint,
)
from recipes.checkpoint.manifest import Origin, step_name
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
    "Origin",
    "Retention",
    "Saver",
    "LocalBlocks",
    "LocalShard",
    "checkpoint_bytes",
    "find_checkpoint",
    "global_shape",
    "load_checkpoint",
    "local_memory",
    "own_checkpoints",
    "require_space",
    "retain",
    "save_checkpoint",
    "step_name",
    "verify_checkpoint",
]

"""Tied weights as the files have them: config.json may tie what the files hold twice, with other values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from recipes.models.hf.weight_files import FolderError, weight_files
from recipes.runtime.safetensors_codec import HeaderError, TensorLocation, read_header

_CHUNK_BYTES = 1 << 24


def unlike_pairs(folder: Path, tied: Mapping[str, str], in_state: Callable[[str], str]) -> list[str]:
    """Lists the second names of tied tensors that a folder's files hold with values of their own.

    transformers does not tie these, whatever the config says (`PreTrainedModel.tie_weights`).

    Args:
        folder: The checkpoint.
        tied: Second name -> first name, in the model's state.
        in_state: Maps a name in the files to that in the state.
    """
    if not tied:
        return []
    try:
        every = [each for file in weight_files(folder) for each in read_header(file)]
    except (OSError, HeaderError, FolderError):
        return []  # said by whoever reads the weights
    stored = {in_state(each.spec.name): each for each in every}
    both = [name for name, first in tied.items() if name in stored and first in stored]
    return [name for name in both if not _equal(stored[name], stored[tied[name]])]


def _equal(a: TensorLocation, b: TensorLocation) -> bool:
    if (a.spec.dtype, a.spec.shape) != (b.spec.dtype, b.spec.shape):
        return False
    with a.file.open("rb") as one, b.file.open("rb") as other:
        one.seek(a.start)
        other.seek(b.start)
        left = a.spec.num_bytes
        while left:
            size = min(left, _CHUNK_BYTES)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True

"""Foresees how often a run passes over each source of a blend."""

from __future__ import annotations

from moe.errors import DataError, Mistake
from recipes.data.blend import BlendedSamples
from recipes.data.build_data import TrainData


def foresee_blend(data: TrainData, samples: int) -> list[str]:
    """Returns a line for each source of a blend: its share, tokens and epochs; none for other data.

    Args:
        data: Data of the run.
        samples: Training samples from the first of the data to the last of the run.

    Raises:
        DataError: The run passes over a source more often than its ``max_epochs`` allows.
    """
    if not isinstance(data.train, BlendedSamples):
        return []
    lines, mistakes = [], []
    for i, (source, drawn) in enumerate(
        zip(data.sources, data.train.drawn(0, samples).tolist(), strict=True)
    ):
        epochs = drawn / source.train.samples_per_epoch
        lines.append(
            f"data: {source.name}: {float(source.share):.2%} of the samples; {drawn * data.train.seq_len:,} "
            f"of the run's tokens are {epochs:.2f} epochs of its {source.train.num_tokens:,}"
        )
        if source.max_epochs is not None and epochs > source.max_epochs:
            rule = f"the run takes {epochs:.2f} epochs of {source.name}: {drawn:,} samples, and it has "
            rule += f"{source.train.samples_per_epoch:,}"
            remedy = "Give it more documents or a smaller weight, train fewer steps, or allow more epochs."
            mistakes.append(Mistake(f"data.blend[{i}].max_epochs", source.max_epochs, rule, remedy))
    if mistakes:
        raise DataError(mistakes)
    return lines

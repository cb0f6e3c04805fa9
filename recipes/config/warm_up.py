"""Scales default warm-ups to short runs: one that nobody has set cannot be a mistake of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# A warm-up, and the steps that it is a part of.
_WARM_UPS = {
    "optim.schedule.warmup_steps": "train.steps",
    "model.warmup_steps": "model.steps",
    "stage2.warmup_steps": "stage2.steps",
}
# A default warm-up takes no more than one in so many steps.
_SHARE = 5


def scale_warm_ups(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Lowers, in place, each warm-up that no override sets to a fifth of its steps; set ones stay.

    Args:
        values: The composed config; what has a wrong type is left for the schema.
        overrides: As on the command line.
    """
    for path, length in _WARM_UPS.items():
        section, _, name = path.rpartition(".")
        options, steps = _find(values, section), _find(values, length)
        if type(steps) is not int or steps < 1 or not isinstance(options, dict):
            continue
        if type(options.get(name)) is int and not any(_sets(override, path) for override in overrides):
            options[name] = min(options[name], steps // _SHARE, _before_decay(options, steps))


def _before_decay(options: Mapping[str, Any], steps: int) -> int:
    """Returns the most steps that the decay of a schedule leaves for the warm-up."""
    share = options.get("decay_fraction")
    if options.get("kind") != "wsd" or not isinstance(share, float) or not 0 < share <= 1:
        return steps
    return max(0, steps - max(1, round(share * steps)) - 1)


def _sets(override: str, path: str) -> bool:
    key, _, value = override.lstrip("+~").partition("=")
    return key == path or (path.startswith(f"{key}.") and path.rpartition(".")[2] in value)


def _find(values: Mapping[str, Any], path: str) -> Any:
    found: Any = values
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found

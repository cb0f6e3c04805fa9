"""Checks of a config class: every broken rule is told, not only the first."""

from __future__ import annotations


def require(*rules: tuple[bool, str]) -> None:
    """Checks rules, each given as whether it holds and what to say when it does not.

    Raises:
        ValueError: One line for every rule that is broken.
    """
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ValueError("\n".join(broken))

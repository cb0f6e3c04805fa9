"""Silences what other libraries print in the middle of a command."""

from __future__ import annotations

import os
import sys
import warnings

_SETTINGS = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def quiet_libraries() -> None:
    """Silences bars and advice of transformers, and warnings of changes to come; call it before imports.

    What a user has set stays: the variables above, and all warnings under ``python -W`` or PYTHONWARNINGS.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        # They are for who writes against a library, and its users cannot act on them.
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)

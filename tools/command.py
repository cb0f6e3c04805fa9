"""How a command ends: the exit code and the sentence, the same for every tool.

0: what was asked for was done. 1: it failed. 2: a user's mistake. 130: interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from moe.errors import GraftError, Mistake, UserError

INTERRUPTED = 130
STDOUT = "-"


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits. Errors to act on become lines on stderr; bugs keep their traceback.

    Args:
        main: The command; returns its exit code.
    """
    try:
        code = main()
        sys.stdout.flush()
    except GraftError as error:
        code = error.exit_code
        lines = [str(m) for m in error.mistakes] if isinstance(error, UserError) else [str(error)]
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
    except KeyboardInterrupt:
        code = INTERRUPTED
        print("error: interrupted.", file=sys.stderr)
    except BrokenPipeError:
        # The reader went away (such as `| head`): silence, also when Python flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        code = 2
        place = f" for {error.filename}" if error.filename else ""
        print(f"error: no space left on the disk{place}. Free some, or name another place.", file=sys.stderr)
    sys.exit(code)


def check_json_target(target: str | None) -> list[Mistake]:
    """What is wrong with the value of a ``--json`` flag, found before the work whose figures go there."""
    if target is None or not Path(target).is_dir():
        return []
    return [Mistake("--json", target, "is a folder", "Name a file in it, or give - for stdout.")]


def write_json(target: str | None, figures: Mapping[str, Any]) -> None:
    """Writes figures where a ``--json`` flag says: a file, replaced whole; stdout for ``-``; None is nowhere.

    Raises:
        DiskError: The file cannot be written.
    """
    if target == STDOUT:
        print(json.dumps(figures, indent=2))
    elif target is not None:
        from recipes.runtime.atomic import atomic_write_json

        atomic_write_json(target, figures)

"""Starts ranks on this machine through torch's elastic agent, as torchrun does, without its output."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from typing import Any

from recipes.runtime.interrupt import INTERRUPTED
from recipes.runtime.rank_lines import whole_lines
from recipes.runtime.source_root import child_environment, interpreter


def start_ranks(ranks: int, arguments: Sequence[str], restarts: int = 0) -> int:
    """Runs a command on this many ranks until all have ended; returns the exit code of the first that failed.

    Lines of ranks other than 0 begin with their rank. What a rank says about its failure is all that is said,
    except that a rank that a signal has ended says nothing: then it is named. Signals are passed on.

    Args:
        ranks: Processes.
        arguments: What follows the interpreter.
        restarts: How often all are started again after a failure.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.update(child_environment())
    if ranks > 1:  # as torchrun does; the engine gives each rank its share of the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The agent logs each failure at length, and what the ranks have said is enough.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="graft-ranks-") as folder, whole_lines():
        try:
            elastic_launch(_config(ranks, restarts, folder), interpreter())("-u", *arguments)
        except ChildFailedError as error:
            return _explain(*error.get_first_failure())
        except SignalException as error:
            _wait_for_ranks(error.sigval)
            return INTERRUPTED
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _config(ranks: int, restarts: int, folder: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        logs_specs=DefaultLogsSpecs(folder, tee=dict.fromkeys(range(1, ranks), Std.ALL)),
        log_line_prefix_template="[rank ${rank}] ",
    )


def _explain(rank: int, failure: Any) -> int:
    if failure.exitcode > 0:
        return int(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    remedy = "If memory ran out, set a smaller train.micro_batch_size; go on with resume=auto."
    print(f"error: rank {rank} was ended by {name}. {remedy}", file=sys.stderr)
    return 1


def _wait_for_ranks(number: int) -> None:
    """Lets ranks end that are still there: a second signal came while the agent waited for them."""
    import psutil

    left = psutil.Process().children()
    for process in left if number == signal.SIGINT else ():
        process.kill()
    psutil.wait_procs(left)

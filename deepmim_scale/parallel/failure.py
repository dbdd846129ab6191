"""How a rank leaves when a peer hangs or dies: one line that says where it waited, exit code 1."""

from __future__ import annotations

import os
import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from deepmim_scale.data.stage_exchange import FeedMismatch, PeerFailed
from deepmim_scale.parallel.executor import Executor
from deepmim_scale.parallel.watch import place
from deepmim_scale.runs import stop

_PACKAGE = str(Path(__file__).parents[1])


def limit_waits(seconds: float) -> None:
    """Make `seconds` the time-out of process groups to come, DeepSpeed's own included.

    torch gives groups 10 or 30 minutes, whatever the time-out of the group of all ranks.
    """
    distributed_c10d.default_pg_timeout = timedelta(seconds=seconds)
    distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=seconds)


def is_of_peers(error: BaseException) -> bool:
    """Whether other processes are the cause (gloo raises bare RuntimeErrors)."""
    # The second text is of work that was under way when another one's time ran out.
    ours = any(text in str(error) for text in ("/gloo/", "timeout caused pair closure"))
    return isinstance(error, dist.DistError | PeerFailed | FeedMismatch) or ours


def leave(error: Exception, executor: Executor | None) -> NoReturn:
    """End this process at once, whatever its threads and process groups still wait for.

    The last line on stderr names rank, host, stage, micro-batch, instruction and function; the
    traceback of an error of its own comes before it.
    """
    if is_of_peers(error) and stop.may_leave_unsaved():  # they have left for the same reason
        stop.leave_unsaved(stop.reason())
    sys.stdout.flush()
    if not is_of_peers(error):
        traceback.print_exception(error)
    # The innermost function of ours says more than torch's frames below it.
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    function = f"{Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else "?"
    where = executor.where if executor else "starting"
    # "[/path/to/gloo/pair.cc:545] Timed out ... . This is typically caused by ..."
    reason = re.sub(r"^\[\S*\] ", "", str(error)).split("\n")[0].split(". ")[0]
    if not is_of_peers(error):
        reason = f"{type(error).__name__}: {reason}"
    print(f"error: {place()}, {where}, in {function}: {reason}", file=sys.stderr, flush=True)
    # Not sys.exit: threads and process groups that wait for a lost peer would hold it up.
    os._exit(1)

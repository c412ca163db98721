"""How the processes of a job find each other: a store that all reach, and agreement on which start of the job it is.

torchrun keeps its store when it restarts the ranks, with all that the last start left there, and counts restarts on
each machine by itself. So the ranks agree on a token that none of an earlier start can know, and keep what they write
under it.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from clt.distributed.watchdog import leave

_POLL_SECONDS = 0.02


def meet(timeout_seconds: float) -> tuple[dist.Store, int, int]:
    """Waits for all ranks of the job that the environment describes; a process without one is a job by itself.

    Args:
        timeout_seconds: how long; then the process ends with a line that names who is missing.

    Returns:
        A store for this start of the job, the number of this process, and how many there are.
    """
    if "RANK" not in os.environ:
        # DeepSpeed insists on the variable; torchrun sets it.
        os.environ.setdefault("LOCAL_RANK", "0")
        return dist.HashStore(), 0, 1
    rank = os.environ["RANK"]
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, number, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        token = agree_on_token(store, number, world, timeout_seconds)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        leave(f"rank {rank}: the ranks did not meet at {place} ({reason}); see the log of the missing one")
    return dist.PrefixStore(token, store), number, world


def agree_on_token(store: dist.Store, rank: int, world: int, timeout_seconds: float) -> str:
    """A word that the ranks of this start share and those of no other start know.

    Every rank leaves a word of its own; the first answers with the token and all the words, until every rank has seen
    its own among them.

    Args:
        store: reached by all ranks.
        rank: number of this process.
        world: how many there are.
        timeout_seconds: how long to wait for the others.

    Raises:
        DistStoreError: a rank did not come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    store.set(f"clt/word/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            words = _read(store, "clt/word", world)
            store.set("clt/answer", json.dumps({"token": own, "words": words}))
            if _read(store, "clt/seen", world)[1:] == [own] * (world - 1):
                return own
        elif store.check(["clt/answer"]):
            answer = json.loads(store.get("clt/answer"))
            # An earlier start may have had fewer ranks.
            if answer["words"][rank : rank + 1] == [own]:
                store.set(f"clt/seen/{rank}", answer["token"])
                return str(answer["token"])
        time.sleep(_POLL_SECONDS)
    if rank:
        raise dist.DistStoreError("rank 0 did not answer")
    missing = [str(r) for r, seen in enumerate(_read(store, "clt/seen", world)) if r and seen != own]
    raise dist.DistStoreError(f"rank {', '.join(missing)} of {world} did not come")


def _read(store: dist.Store, key: str, world: int) -> list[str]:
    """What ranks have left under a key; empty for those that have left nothing."""
    keys = [f"{key}/{rank}" for rank in range(world)]
    return [store.get(key).decode() if store.check([key]) else "" for key in keys]

"""Rendezvous of a job's processes: a store that all reach, with keys of this start of the job only.

torchrun keeps its store when it restarts the ranks, with the keys of the last start, and counts restarts on each
machine separately. So the ranks agree on a token that no earlier start has, and write under its prefix.
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
    """Waits for all ranks of the job that the environment describes; without one, this process is a job by itself.

    Args:
        timeout_seconds: after this time the process ends with a line that names the missing ranks.

    Returns:
        A store for this start of the job, the rank of this process, and the number of ranks.
    """
    if "RANK" not in os.environ:
        # DeepSpeed requires the variable, which torchrun sets.
        os.environ.setdefault("LOCAL_RANK", "0")
        return dist.HashStore(), 0, 1
    rank = os.environ["RANK"]
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, number, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        token = agree_on_token(store, number, world, timeout_seconds)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        leave(f"rank {rank}: rendezvous at {place} failed ({reason}); see the log of the missing rank")
    return dist.PrefixStore(token, store), number, world


def agree_on_token(store: dist.Store, rank: int, world: int, timeout_seconds: float) -> str:
    """A token shared by the ranks of this start of the job and unknown to every other start.

    Every rank writes a random word; rank 0 answers with the token and all words until every rank has found its own
    among them.

    Args:
        store: reached by all ranks.
        rank: of this process.
        world: number of ranks.
        timeout_seconds: time to wait for the others.

    Raises:
        DistStoreError: a rank did not join.
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
    raise dist.DistStoreError(f"rank {', '.join(missing)} of {world} did not join")


def _read(store: dist.Store, key: str, world: int) -> list[str]:
    """Values that the ranks have written under a key, empty for ranks that have not."""
    keys = [f"{key}/{rank}" for rank in range(world)]
    return [store.get(key).decode() if store.check([key]) else "" for key in keys]

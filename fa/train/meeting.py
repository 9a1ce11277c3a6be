"""How ranks find each other before they train, what each says of itself, and which of them says what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

JOIN = timedelta(minutes=5)  # of the ranks for each other, which torchrun starts together
PATIENCE = 10.0  # seconds; of a rank that leaves a sentence to another one


def hushed() -> bool:
    """Whether a sentence is left to the first rank of this machine, as all ranks find a slip before they have joined;
    then only after some seconds, as torchrun ends all ranks with the first that ends."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("RANK", ""))
    if not (local.isdecimal() and int(local)) or not called() or dist.is_initialized():
        return False
    outwait()
    return True


def outwait() -> None:
    """Wait for the end of a rank that says why all end; torchrun then ends this one, too."""
    try:
        time.sleep(PATIENCE)
    except KeyboardInterrupt:  # torchrun's
        pass


def called() -> bool:
    """Whether torchrun, or whoever sets its variables, started this process as one of several ranks."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"


def apart(of: Sequence[Mapping[str, str]]) -> str:
    """What ranks have in another version than rank 0, name -> version of each with its "host", as a sentence; "" if
    nothing."""
    wrong = []
    for name in of[0].keys() - {"host"}:
        held: dict[str, dict[str, int]] = {}  # version -> host -> its first rank
        for rank, own in enumerate(of):
            held.setdefault(own.get(name, "unknown"), {}).setdefault(own["host"], rank)
        if len(held) > 1:
            where = {v: ", ".join(f"{host} (rank {rank})" for host, rank in on.items()) for v, on in held.items()}
            wrong.append(f"{name} is " + " and ".join(f"{version} on {hosts}" for version, hosts in where.items()))
    more = "; make them alike, and call again on every machine"
    return f"ranks that train together must be alike, but {', '.join(sorted(wrong))}{more}" if wrong else ""


def meet(store: dist.Store, rank: int, size: int, own: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """A word that no earlier ranks have used, and what each rank says of itself; TimeoutError where one is missing.

    torchrun keeps its store when it starts ranks again, and each of its agents counts restarts by itself. So every rank
    signs with an identity of its own, rank 0 lists them, and each confirms a list that has its own. Ranks that are gone
    confirm none, so that a list that all have confirmed is of ranks that are there.
    """
    own, until = own | {"identity": uuid.uuid4().hex}, time.monotonic() + JOIN.total_seconds()
    signed = [f"rank {r}" for r in range(size)]
    store.set(signed[rank], json.dumps(own))
    while time.monotonic() < until:
        if rank == 0 and store.check(signed):
            store.set("list", json.dumps([json.loads(text) for text in store.multi_get(signed)]))
        listed = store.get("list") if store.check(["list"]) else b"[]"
        if own in (found := json.loads(listed)):
            word = hashlib.sha256(listed).hexdigest()
            store.set(f"{word} {rank}", "")
            if store.check([f"{word} {r}" for r in range(size)]):
                return word, found
        time.sleep(0.1)
    raise TimeoutError

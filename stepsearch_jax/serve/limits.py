"""What a request may ask for, and how many bytes are held for all clients together."""

from __future__ import annotations

import asyncio
import dataclasses

from stepsearch_jax.search.callback import MAX_QUERY_CHARACTERS
from stepsearch_jax.search.remote import MAX_BODY_BYTES

FLAGS = {  # of the limits: default, help
    "body_bytes": (MAX_BODY_BYTES, "longest body of a request"),
    "queries": (4096, "queries a request"),
    "transfer_seconds": (
        10.0,
        "time for a request's headers to arrive, again for its body, and again for its answer to "
        "be taken; who takes longer is cut off",
    ),
    "query_characters": (MAX_QUERY_CHARACTERS, "longest query"),
    "topk": (100, "most documents a query"),
    "searches": (4, "requests searched for at a time"),
    "waiting": (256, "requests that may wait for it; more are answered 503"),
    "held_bytes": (
        1 << 25,
        "bytes of answers that clients have not taken yet, for all clients together, and again of "
        "bodies; answers wait for it, bodies are answered 503",
    ),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how much is done and held at once. FLAGS explains each."""

    body_bytes: int
    transfer_seconds: float
    queries: int
    query_characters: int
    topk: int
    searches: int
    waiting: int
    held_bytes: int

    def check(self) -> None:
        """Raises ValueError, with the flag, for a limit with which nothing could be answered."""
        for name, value in dataclasses.asdict(self).items():
            if not value >= (0 if name == "waiting" else 1e-3 if name == "transfer_seconds" else 1):
                raise ValueError(f"--max-{name.replace('_', '-')}={value} is too little")
        if self.held_bytes < self.body_bytes:
            raise ValueError(
                f"--max-held-bytes={self.held_bytes} must be at least "
                f"--max-body-bytes={self.body_bytes}"
            )


class Budget:
    """Bytes that are held for all clients together, at most `limit`. For one event loop."""

    def __init__(self, limit: int):
        self.held = 0
        self._limit = limit
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    def try_take(self, size: int) -> bool:
        """Takes `size` bytes if they are free -> whether they were."""
        if self.held + size > self._limit:
            return False
        self.held += size
        return True

    async def take(self, size: int) -> None:
        """Takes `size` bytes when they are free: first come, first served.

        More than the limit are taken when nothing else is held.
        """
        async with self._turn:
            while self.held and self.held + size > self._limit:
                self._freed.clear()
                await self._freed.wait()
            self.held += size

    def free(self, size: int) -> None:
        """Gives back what was taken."""
        self.held -= size
        self._freed.set()

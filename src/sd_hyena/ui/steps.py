"""Work in a thread of its own, seen step by step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..compare import Progress

Item = TypeVar("Item")
Step = tuple[str, int, int]


def seen(work: Callable[[Progress], Iterator[Item]]) -> Iterator[Item | Step]:
    """What ``work`` yields, and between it the steps that it tells of, as they come. Raises what it raises."""
    events: queue.SimpleQueue[Item | Step | BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            for item in work(lambda who, done, total: events.put((who, done, total))):
                events.put(item)
            events.put(None)
        except BaseException as error:
            events.put(error)

    threading.Thread(target=run, daemon=True).start()
    while (event := events.get()) is not None:
        if isinstance(event, BaseException):
            raise event
        yield event

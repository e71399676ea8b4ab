"""Requests side by side, whose answers an interrupt does not wait for, as it would with Python's own pools."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> dict[Item, Result]:
    """``function`` of each item, in daemon threads. Raises what it raised for the first item that failed."""
    futures: dict[Item, Future[Result]] = {item: Future() for item in items}
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                futures[item].set_result(function(item))
            except BaseException as e:
                futures[item].set_exception(e)

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, name="request", daemon=True).start()
    try:
        return {item: future.result() for item, future in futures.items()}
    finally:
        over.set()

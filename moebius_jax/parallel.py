"""Several waits at once."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_THREADS = 8


def for_each(call: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Calls for every item, eight at a time and begun in order.

    Raises:
        Exception: the first item's whose call failed; those that have not begun by then are left out.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for _ in pool.map(call, items):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

"""Reading files in threads, a little ahead of whoever uses them."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")


def prefetch(read: Callable[[Item], Read], items: Iterable[Item], *, ahead: int = 16) -> Iterator[Read]:
    """`map(read, items)`, in order, with up to `ahead` results waiting."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pending: collections.deque[concurrent.futures.Future[Read]] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

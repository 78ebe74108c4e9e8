"""Reading ahead and grouping by size, so that computing need not wait for files; never more than a few images at once."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar


Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    executor: Executor, work: Callable[[Item], Result], items: Iterable[Item], waiting: int = 4
) -> Iterator[Result]:
    """What `work` gives for each item, in order, started for up to `waiting` items before it is asked for.

    Args:
        executor (`Executor`): Does the work.
        work (`Callable`): From item to result; what it raises is raised here.
        items (`Iterable`): Read no further than needed.
        waiting (`int`): Results that are made or in the making at most.
    """
    items, started = iter(items), deque()
    while True:
        while len(started) < waiting and (item := next(items, started)) is not started:
            started.append(executor.submit(work, item))
        if not started:
            return
        yield started.popleft().result()


def in_buckets(
    items: Iterable[Item], key: Callable[[Item], object], size: int, held: int | None = None
) -> Iterator[list[Item]]:
    """Groups of up to `size` items with the same key; in order where `size` is 1.

    Args:
        items (`Iterable`): Read no further than needed.
        key (`Callable`): What the items of a group share.
        size (`int`): Items in a group at most.
        held (`int`, *optional*): Items held back at most until their group is full; `4 * size` when missing. Then the
            group that waits longest goes as it is.
    """
    held = 4 * size if held is None else held
    buckets: OrderedDict[object, list[Item]] = OrderedDict()
    number = 0
    for item in items:
        bucket = buckets.setdefault(key(item), [])
        bucket.append(item)
        number += 1
        if len(bucket) == size or number > held:
            full = key(item) if len(bucket) == size else next(iter(buckets))
            group = buckets.pop(full)
            number -= len(group)
            yield group
    yield from buckets.values()


__all__ = ["ahead", "in_buckets"]

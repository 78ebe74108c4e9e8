"""Reading ahead is bounded and in order; buckets hold what belongs together."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from unihema.lookahead import ahead, in_buckets


def test_results_come_in_order_and_not_too_many_items_are_taken():
    taken = []

    def items():
        for number in range(10):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(1) as executor:
        results = ahead(executor, lambda n: n * n, items(), waiting=3)
        assert next(results) == 0 and len(taken) == 3
        assert next(results) == 1 and len(taken) == 4
        assert list(results) == [n * n for n in range(2, 10)]


def test_an_error_of_the_work_is_raised_in_its_turn():
    with ThreadPoolExecutor(1) as executor:
        results = ahead(executor, lambda n: 1 // n, [1, 0, 1])
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)


@pytest.mark.parametrize(
    ("size", "held", "expected"),
    [
        (1, None, [["a1"], ["b1"], ["a2"], ["c1"], ["a3"], ["b2"]]),
        (2, None, [["a1", "a2"], ["b1", "b2"], ["c1"], ["a3"]]),
        (3, 2, [["a1", "a2"], ["b1"], ["c1"], ["a3"], ["b2"]]),
    ],
)
def test_groups_share_their_key_and_nothing_waits_for_ever(size, held, expected):
    items = ["a1", "b1", "a2", "c1", "a3", "b2"]
    groups = list(in_buckets(items, lambda item: item[0], size, held))
    if held is None:
        assert groups == expected
    assert sorted(sum(groups, [])) == sorted(items)
    assert all(len({item[0] for item in group}) == 1 and len(group) <= size for group in groups)


def test_no_more_items_are_held_than_allowed():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    groups = in_buckets(items(), lambda number: number, 4, held=6)
    assert next(groups) == [0] and len(taken) == 7

"""What became of the inputs of each attack, printed after it."""

import sys

import pytest


@pytest.fixture(autouse=True)
def figures():
    # Where the limits of a child are not to be had, nothing is attacked.
    tallies = getattr(sys.modules.get("robustness.confined"), "tallies", {})
    tallies.clear()
    yield
    for name, tally in tallies.items():
        print(
            f"ATTACK {name}: {tally.accepted} accepted, {tally.refused} refused, {tally.failed} failed, "
            f"at most {tally.memory >> 20} MB and {tally.seconds:.1f} s"
        )

"""Comparing what two analyses of one image found."""

import numpy as np
import pytest

from unihema import SmearResult


def assert_same(found: SmearResult, expected: SmearResult, atol: float = 0.0) -> None:
    assert [cell.label for cell in found.cells] == [cell.label for cell in expected.cells]
    for name in ("box", "score"):
        values = [np.array([getattr(cell, name) for cell in result.cells]) for result in (found, expected)]
        # Boxes are pixels of images of some hundred pixels.
        np.testing.assert_allclose(*values, rtol=0, atol=atol * (100 if name == "box" else 1), err_msg=name)
    assert [{name: value["value"] for name, value in cell.attributes.items()} for cell in found.cells] == [
        {name: value["value"] for name, value in cell.attributes.items()} for cell in expected.cells
    ]
    assert found.answers == expected.answers and found.counts == expected.counts
    assert (found.mask is None) == (expected.mask is None)
    if expected.mask is not None:
        np.testing.assert_array_equal(found.mask, expected.mask)
    if expected.single_cell is not None:
        assert found.single_cell["label"] == expected.single_cell["label"]
        assert found.single_cell["score"] == pytest.approx(expected.single_cell["score"], abs=atol)

"""Parts of the training data that are held out in turn."""

import numpy as np
import pytest

from unihema.errors import DatasetError
from unihema.training.data.splits import fold_rows


def test_folds_hold_out_every_image_once_and_keep_slides_together():
    rows = [
        {"task": "detection", "image": f"{n}.png", "dataset": "lab", **({"slide": n // 3} if n < 6 else {})}
        for n in range(9)
    ]
    rows[0]["slide"] = "0"
    rows[1]["slide"] = rows[2]["slide"] = "0"
    held = [fold_rows({"detection": rows}, 3, fold, 0, held_out=True).get("detection", []) for fold in range(3)]
    kept = [fold_rows({"detection": rows}, 3, fold, 0, held_out=False)["detection"] for fold in range(3)]
    names = [[row["image"] for row in part] for part in held]
    assert sorted(sum(names, [])) == [f"{n}.png" for n in range(9)]
    assert all(len(a) + len(b) == 9 for a, b in zip(held, kept))
    assert any({"0.png", "1.png", "2.png"} <= set(part) for part in names)
    with pytest.raises(DatasetError, match=r"2 images .* cannot be divided into 3 folds"):
        fold_rows({"detection": rows[:3] + rows[8:]}, 3, 0, 0, held_out=True)
    with pytest.raises(ValueError, match="Fold 3 of 3"):
        fold_rows({"detection": rows}, 3, 3, 0, held_out=True)


def test_folds_are_of_like_size_when_slides_are_not():
    slides = ["a"] * 4 + ["b"] * 4 + ["c"] * 4 + ["d"] * 2 + ["e"] * 2 + list("fghi")
    rows = [{"task": "detection", "image": f"{n}.png", "dataset": "lab", "slide": s} for n, s in enumerate(slides)]
    for seed in range(5):
        held = [fold_rows({"detection": rows}, 5, fold, seed, held_out=True)["detection"] for fold in range(5)]
        assert [len(part) for part in held] == [4] * 5


def test_the_fold_of_a_large_slide_comes_last():
    rows = [
        {"task": "detection", "image": f"{n}.png", "dataset": "lab", "slide": s} for n, s in enumerate("aaaaaaaabbcc")
    ]
    held = [fold_rows({"detection": rows}, 3, fold, 0, held_out=True)["detection"] for fold in range(3)]
    assert [len(part) for part in held] == [2, 2, 8]


def test_folds_of_lone_images_are_every_nth_of_a_shuffle():
    rows = [{"task": "detection", "image": f"{n}.png", "dataset": "lab"} for n in range(7)]
    names = sorted(row["image"] for row in rows)
    order = np.random.default_rng(3).permutation(7)
    for fold in range(3):
        held = fold_rows({"detection": rows}, 3, fold, 3, held_out=True)["detection"]
        assert {row["image"] for row in held} == {names[position] for position in order[fold::3]}


def test_rows_of_an_image_stay_together_where_only_one_task_knows_the_patient():
    rows = {
        "detection": [{"image": f"{n}.png", "dataset": "lab", "patient": str(n // 2)} for n in range(12)],
        "question_answering": [{"image": f"{n}.png", "dataset": "lab"} for n in range(12)],
    }
    for fold in range(3):
        parts = [fold_rows(rows, 3, fold, 0, held_out) for held_out in (False, True)]
        seen, held = ({row["image"] for found in part.values() for row in found} for part in parts)
        assert not seen & held and len(held) == 4

"""The official model's recorded outputs, where they are at hand."""

import numpy as np
import pytest
import torch

from tools.parity import compare_arrays, official_value, parity, parity_table, ranked_as_recorded


def test_every_recorded_array_is_reproduced(official_dir):
    rows = parity(official_dir)
    with np.load(official_dir / "golden.npz") as golden:
        assert [row.name for row in rows] == list(golden)
    assert [row.name for row in rows if not row.passed] == []
    assert parity_table(rows).count("| ok |") == len(rows)


def test_a_difference_is_seen():
    recorded = torch.tensor([1.0, 2.0])
    assert compare_arrays("pred_logits", recorded + 5e-5, recorded).passed
    row = compare_arrays("pred_logits", recorded + torch.tensor([0.0, 1e-3]), recorded)
    assert not row.passed and row.difference == pytest.approx(1e-3, rel=1e-3)
    assert not compare_arrays("topk_indices", torch.tensor([1, 2]), torch.tensor([1, 3])).passed
    assert "**differs**" in parity_table([row])


def test_only_ties_are_ranked_as_recorded():
    scores = torch.tensor([0.9, 0.8, 0.8 - 5e-7, 0.7, 0.6])
    cells = {"labels": torch.tensor([1, 3, 2, 5, 4]), "boxes": torch.arange(5)}
    found = ranked_as_recorded(cells, scores, torch.tensor([1, 2, 3, 4, 5]))
    assert found["labels"].tolist() == [1, 2, 3, 5, 4]
    assert found["boxes"].tolist() == [0, 2, 1, 3, 4]


def test_the_filling_rule():
    assert official_value("a.running_var", (3,)).min() >= 1
    assert official_value("a.num_batches_tracked", ()).item() == 0
    assert abs(official_value("norm.weight", (500,)).mean() - 1) < 0.02
    plain, query = official_value("T5_model.x.k.weight", (64, 64)), official_value("T5_model.x.q.weight", (64, 64))
    assert plain.std() == pytest.approx(1 / 8, rel=0.05)
    assert query.std() == pytest.approx(1 / 64, rel=0.05)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"golden\.npz: no such file"):
        parity(tmp_path)

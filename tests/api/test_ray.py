"""A Ray run gives the tables of one run of `unihema predict`."""

import csv
import io
import json
import os

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from unihema import Analyzer, RequestError, SmearResult
from unihema.ray import AnalyzeBatch


pytestmark = pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    """Fields of two sizes, and a file that is no image."""
    folder = tmp_path_factory.mktemp("smears")
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 32 + 8 * (number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def predicted(checkpoint, smears, tmp_path_factory):
    """The results folder of one run."""
    folder = tmp_path_factory.mktemp("predicted")
    report = Analyzer.from_pretrained(checkpoint, device="cpu").analyze_files([smears], folder)
    assert len(report.analysed) == 7 and len(report.failed) == 1
    return folder


def as_csv(rows) -> list[dict[str, str]]:
    """Rows as a CSV file says them, numbers as numbers: `3.0` and `3` are one."""
    return [{name: _number("" if value is None else value) for name, value in row.items()} for row in rows]


def _number(value):
    try:
        return float(value)
    except ValueError:
        return str(value)


def assert_tables(rows, predicted, smears):
    """The rows of a Ray run, in the order of their paths, say what the tables of a results folder say."""
    rows = sorted(rows, key=lambda row: row["path"])
    assert [row["path"] for row in rows] == sorted(map(str, smears.glob("*.png")))
    failed = {row["path"]: row["error"] for row in rows if row["error"]}
    whole = json.loads((predicted / "results.json").read_text())
    assert failed == whole["failed"]
    for table in ("cells", "counts"):
        written = list(csv.DictReader(io.StringIO((predicted / f"{table}.csv").read_text())))
        assert as_csv(cell for row in rows for cell in row[table] or ()) == as_csv(written) and written
    found = [json.loads(row["result"]) for row in rows if row["result"]]
    assert found == whole["images"]
    assert SmearResult.from_dict(found[0]).counts == found[0]["counts"]


def test_rows_are_the_tables_of_predict(checkpoint, smears, predicted):
    paths = np.array(sorted(map(str, smears.glob("*.png"))))
    table = AnalyzeBatch(str(checkpoint), device="cpu")({"path": paths})
    assert_tables(table.to_pylist(), predicted, smears)
    # Together with others of their size, in the order in which they came.
    together = AnalyzeBatch(str(checkpoint), device="cpu", batch_size=4)({"path": paths})
    assert together["path"].to_pylist() == paths.tolist() and together.schema == table.schema
    for one, other in zip(table["cells"].to_pylist(), together["cells"].to_pylist(), strict=True):
        assert [cell["label"] for cell in one or ()] == [cell["label"] for cell in other or ()]


def test_arrays_and_batches_without_cells(checkpoint, smears, tmp_path):
    arrays = np.empty(2, dtype=object)
    arrays[:] = [np.asarray(Image.open(smears / f"{number}.png")) for number in (0, 1)]
    analyze = AnalyzeBatch(str(checkpoint), device="cpu")
    named = analyze({"image": arrays, "path": np.array(["a/0.png", "a/1.png"])})
    unnamed = analyze({"image": arrays})
    assert named["path"].to_pylist() == ["a/0.png", "a/1.png"] and unnamed["path"].to_pylist() == [None, None]
    assert named["image_sha256"].to_pylist() == [None, None]
    assert [row["label"] for row in named["cells"][0].as_py()] == [row["label"] for row in unnamed["cells"][0].as_py()]
    assert {row["image"] for row in named["cells"][1].as_py()} == {"a/1.png"}
    # Of one type, whatever a batch holds: they go into one file.
    none = AnalyzeBatch(str(checkpoint), device="cpu", threshold=1.0)({"image": arrays})
    broken = analyze({"image": np.zeros((1, 5)), "path": np.array(["b.png"])})
    assert none.schema == broken.schema == named.schema and broken["error"][0].as_py()
    with pyarrow.parquet.ParquetWriter(tmp_path / "rows.parquet", named.schema) as writer:
        for table in (named, none, broken):
            writer.write_table(table)
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").num_rows == 5


def test_gaps_of_a_table_are_rows_with_an_error(checkpoint):
    analyze, arrays = AnalyzeBatch(str(checkpoint), device="cpu"), np.empty(2, object)
    arrays[:] = [np.zeros((9, 9, 3), np.uint8), None]
    one, gap = analyze({"image": arrays}).to_pylist()
    assert one["error"] is None and one["result"] and gap["result"] is None
    assert gap["error"] == "Expected a path, bytes, PIL image or array, got NoneType."
    (gap,) = analyze({"path": arrays[1:]}).to_pylist()
    assert (gap["path"], gap["error"], gap["result"]) == (None, "it has no path.", None)


def test_what_is_no_batch(checkpoint):
    with pytest.raises(RequestError, match="columns bytes, and needs one called path or image"):
        AnalyzeBatch(str(checkpoint), device="cpu")({"bytes": np.array([b""])})
    with pytest.raises(RequestError, match="batch_size"):
        AnalyzeBatch(str(checkpoint), batch_size=0)


@pytest.mark.slow
def test_a_cluster_of_two_workers(checkpoint, smears, predicted, tmp_path):
    """With the real Ray: two nodes of one processor each, and a worker that dies. The rows are one run's tables, each once."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'unihema[ray]'")
    from ray.cluster_utils import Cluster

    died = tmp_path / "died"

    class DiesOnce(AnalyzeBatch):
        def __call__(self, batch):
            if any(path.endswith("3.png") for path in batch["path"]) and not died.exists():
                died.touch()
                os._exit(1)
            return super().__call__(batch)

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        cluster.add_node(**small)
        environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
        ray.init(address=cluster.address, runtime_env={"env_vars": environment}, log_to_driver=False)
        items = [{"path": str(path)} for path in sorted(smears.glob("*.png"))]
        how = {
            "fn_constructor_kwargs": {"checkpoint": str(checkpoint), "device": "cpu"},
            "batch_size": 2,
            "num_cpus": 1,
        }
        rows = ray.data.from_items(items, override_num_blocks=4).map_batches(DiesOnce, concurrency=2, **how)
        rows.write_parquet(str(tmp_path / "rows"))
        pictures = ray.data.read_images([str(smears / f"{number}.png") for number in range(7)], include_paths=True)
        arrays = pictures.map_batches(AnalyzeBatch, concurrency=1, **how).take_all()
    finally:
        ray.shutdown()
        cluster.shutdown()
    written = pyarrow.parquet.read_table(tmp_path / "rows").to_pylist()
    assert died.exists()
    assert_tables(written, predicted, smears)
    cells = {row["path"]: row["cells"] for row in written if not row["error"]}
    assert {row["path"]: row["cells"] for row in arrays} == cells

"""Images of a Ray cluster: a class for `map_batches`, whose rows Parquet takes."""

import json
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unihema.analyzer import Analyzer
from unihema.errors import InputTypeError, PackageMissingError, RequestError, UnreadableImageError
from unihema.files import open_image
from unihema.result_folder import (
    COUNT_COLUMNS,
    FAILURES,
    Work,
    analyze_each,
    cell_table,
    count_rows,
    in_buckets,
    one_line,
)
from unihema.results.export import cell_columns, cell_row, in_characters
from unihema.slides import ImageRegions, image_sha256, open_regions


if TYPE_CHECKING:
    import numpy
    import pyarrow


# Columns of the tables that are text; all others are numbers.
_TEXT = {"image", "label", "differential", "warnings", "detection_label", "second_look"}
_WHOLE = {"cell_id", "count", "area"}


class AnalyzeBatch:
    """Analyses batches of images; each worker of `map_batches` makes one.

    A batch has the column `path`: files that the worker can open, read as `unihema predict` reads them. With a column `image`
    (arrays, as of `ray.data.read_images`) these are analysed, and `path`, where there is one, only names them.

    A row is an image: `path`, `image_sha256` (null of an array), `error` (null where there is none), `counts` and `cells` (rows
    of `counts.csv` and `cells.csv`), and `result`, as JSON what [`SmearResult.from_dict`] takes.

    Args:
        checkpoint (`str`): As of [`Analyzer.from_pretrained`]; each node needs it at this place, or gets it from the Hub.
        device, adapters, image_sizes, int8: As there.
        batch_size (`int`): Images of one size that the model is given together: faster on a GPU, with the same results up to
            float rounding.
        **asked: `tasks`, `prompt`, `questions`, `threshold` and the others of [`Analyzer.request`].

    Raises:
        CheckpointError, RequestError: As of these two.
        PackageMissingError: pyarrow is not installed.

    Example:

    ```python
    >>> import ray
    >>> from unihema.ray import AnalyzeBatch

    >>> images = ray.data.from_items([{"path": "/scratch/slides/a.svs"}])
    >>> analyzer = {"checkpoint": "/scratch/unihema"}
    >>> rows = images.map_batches(AnalyzeBatch, fn_constructor_kwargs=analyzer, batch_size=1, concurrency=8, num_cpus=1)
    >>> rows.write_parquet("/scratch/results")
    ```
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        device: str = "auto",
        adapters: Any = (),
        image_sizes: Mapping[str, int] | None = None,
        int8: bool = False,
        batch_size: int = 1,
        **asked: Any,
    ):
        try:
            import pyarrow
        except ImportError as error:
            raise PackageMissingError(
                "pyarrow is not installed. Install it with: pip install 'unihema[ray]'"
            ) from error
        if batch_size < 1:
            raise RequestError(f"batch_size must be 1 or more, got {batch_size}.")
        self.batch_size = batch_size
        self.analyzer = Analyzer.from_pretrained(
            checkpoint, device=device, adapters=adapters, image_sizes=image_sizes, int8=int8
        )
        self.request = self.analyzer.request(**asked)
        self._weights = self.analyzer.weights_sha256()
        self._attributes, self._groups = cell_table(self.analyzer, self.request)
        text = {*_TEXT, *self._attributes}

        def table(columns: list[str]) -> "pyarrow.DataType":
            kinds = {name: pyarrow.string() if name in text else pyarrow.float64() for name in columns}
            return pyarrow.list_(pyarrow.struct(kinds | {name: pyarrow.int64() for name in columns if name in _WHOLE}))

        # Said, for what a batch happens to hold would make each of another type.
        self.schema = pyarrow.schema(
            {
                **dict.fromkeys(("path", "image_sha256", "error"), pyarrow.string()),
                "counts": table(COUNT_COLUMNS),
                "cells": table(cell_columns(self._attributes, *self._groups)),
                "result": pyarrow.string(),
            }
        )

    def __call__(self, batch: "dict[str, numpy.ndarray]") -> "pyarrow.Table":
        """Analyses a batch.

        Args:
            batch (`dict[str, np.ndarray]`): Columns `path`, `image`, or both.

        Raises:
            RequestError: It has neither.
        """
        import pyarrow

        rows: dict[int, dict[str, Any]] = {}
        for group in in_buckets(self._works(batch), attrgetter("size"), self.batch_size):
            waiting = [work for work in group if work.opened]
            found = analyze_each(self.analyzer, self.request, [work.opened for work in waiting if work.opened])
            for work, work.outcome in zip(waiting, found, strict=True):
                work.close()
            rows |= {int(work.name): self._row(work) for work in group}
        return pyarrow.Table.from_pylist([row for _, row in sorted(rows.items())], self.schema)

    def _works(self, batch: "dict[str, numpy.ndarray]") -> Iterator[Work]:
        arrays, paths = batch.get("image"), batch.get("path")
        if arrays is None and paths is None:
            raise RequestError(
                f"A batch has the columns {', '.join(batch) or 'none'}, and needs one called path or image."
            )
        for number in range(len(arrays if paths is None else paths)):
            # Of a table with gaps, `None`: a row says so, and the others go on.
            path = None if paths is None or paths[number] is None else str(paths[number])
            work = Work(Path(path or ""), str(number))
            try:
                if arrays is None:
                    if path is None:
                        raise UnreadableImageError("it has no path.")
                    work.digest, work.opened = image_sha256(work.path), open_regions(path)
                else:
                    work.opened = ImageRegions(open_image(arrays[number])._replace(name=path))
                work.opened.pixels.load()
            except (*FAILURES, InputTypeError) as error:
                work.outcome = one_line(error, path)
                work.close()
            yield work

    def _row(self, work: Work) -> dict[str, Any]:
        row = {"path": str(work.path) if work.path.name else None, "image_sha256": work.digest or None}
        if isinstance(work.outcome, str):
            return in_characters(row | {"error": work.outcome})
        result = work.outcome
        result.provenance |= {"checkpoint_sha256": self._weights, "image_sha256": work.digest or None}
        return row | {
            "counts": list(map(in_characters, count_rows(result))),
            "cells": [in_characters(cell_row(result, cell, self._attributes, *self._groups)) for cell in result.cells],
            "result": json.dumps(result.to_dict()),
        }


__all__ = ["AnalyzeBatch"]

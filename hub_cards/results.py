"""Measured figures in a card: a table for readers, and the Hub's model index."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from unihema.modeling_unihema.tasks import TASK_TABLE

from .data_sources import DataRecord


# Figure -> the Hub's name of the metric, and what to call it.
METRICS = {
    "mAP50": ("map", "mean average precision at IoU 0.5"),
    "mAP": ("map", "mean average precision at IoU 0.5 to 0.95"),
    "dice": ("dice", "Dice, mean of images"),
    "accuracy": ("accuracy", "accuracy"),
    "macro_f1": ("f1", "macro F1"),
    "exact_match": ("exact_match", "exact match"),
    "bleu4": ("bleu", "BLEU-4"),
    "rougeL": ("rouge", "ROUGE-L"),
}


def whole_figures(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures of a whole task, without those of its classes, attributes and questions."""
    yield from ((name, value) for name, value in values.items() if _is_figure(value))
    for name, value in (values.get("morphology") or {}).items():
        if _is_figure(value):
            yield f"morphology {name}", value


def result_lines(metrics: Mapping[str, Any] | None) -> list[str]:
    """A table with a row for each measured task, and for each data set of several; no lines where nothing was measured.

    Args:
        metrics (`Mapping`, *optional*): `metrics.json`: task -> figures. `rows` says on how many; `intervals` may have
            the interval of a figure, `{"mAP50": [0.65, 0.77]}`; `datasets` the same for each data set.
    """
    rows, with_intervals = [], False
    for task, values in (metrics or {}).items():
        parts = values.get("datasets") or {}
        for name, part in {task: values, **{f"{task}, {data}": part for data, part in parts.items()}}.items():
            if shown := _shown(part):
                rows.append(f"| {name} | {part.get('rows', 'not counted')} | {shown} |")
                with_intervals |= bool(part.get("intervals"))
    if not rows:
        return []
    note = ["", "In brackets: 95 % interval, from resamples of the images."] if with_intervals else []
    return ["| task | rows | figures |", "|---|---|---|", *rows, *note]


def _shown(values: Mapping[str, Any]) -> str:
    intervals = values.get("intervals") or {}
    shown = []
    for name, value in whole_figures(values):
        between = intervals.get(name)
        shown.append(f"{name} {value:.3f}" + (f" ({between[0]:.3f} to {between[1]:.3f})" if between else ""))
    return ", ".join(shown)


def eval_results(metrics: Mapping[str, Any] | None, record: DataRecord, split: str) -> list[EvalResult] | None:
    """The figures as the Hub indexes them; none where it is not known on which data they were measured.

    Args:
        metrics (`Mapping`, *optional*): `metrics.json`.
        record ([`DataRecord`]): The data.
        split (`str`): Split that was measured on.
    """
    if not metrics or not record.sources:
        return None
    names = " + ".join(source.name for source in record.sources)
    identifier = record.sources[0].hub_id if len(record.sources) == 1 else None
    found = []
    for task, values in metrics.items():
        intervals = values.get("intervals") or {}
        for name, value in whole_figures(values):
            if name in METRICS and task in TASK_TABLE:
                metric_type, metric_name = METRICS[name]
                found.append(
                    EvalResult(
                        task_type=TASK_TABLE[task].pipeline,
                        task_name=task,
                        dataset_type=identifier or names.lower().replace(" ", "-"),
                        dataset_name=names,
                        dataset_split=split,
                        dataset_args={"rows": values["rows"]} if "rows" in values else None,
                        metric_type=metric_type,
                        metric_name=metric_name,
                        metric_value=round(value, 4),
                        metric_args={"interval": list(intervals[name])} if name in intervals else None,
                    )
                )
    return found or None


def stale_result(results: Sequence[EvalResult] | None, metrics: Mapping[str, Any] | None) -> str | None:
    """What a card says otherwise than `metrics.json` does; nothing where they agree or one of them is missing."""
    for result in results or () if metrics else ():
        figures = dict(whole_figures(metrics.get(result.task_name) or {}))
        name = next((name for name, (_, shown) in METRICS.items() if shown == result.metric_name), None)
        if name in figures and round(figures[name], 4) != result.metric_value:
            return f"its {result.task_name} {name} is {result.metric_value}, that of metrics.json {figures[name]:.4f}"
    return None


def metric_ids(metrics: Mapping[str, Any] | None) -> list[str] | None:
    """The Hub's names of the metrics that were measured."""
    names = (name for values in (metrics or {}).values() for name, _ in whole_figures(values) if name in METRICS)
    return list(dict.fromkeys(METRICS[name][0] for name in names)) or None


def _is_figure(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


__all__ = ["METRICS", "eval_results", "metric_ids", "result_lines", "stale_result", "whole_figures"]

"""The comparison as rows, sums and a verdict for each task, and as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.comparison import UNIHEMA, unihema_item
from benchmarks.peers.peers import COMPARED, FIGURES, PEERS
from benchmarks.peers.speed import ALL_PEERS
from unihema.training.studies.study import shown, table


NAMES = {"mAP50": "mAP50", "mAP": "mAP", "dice": "Dice", "iou": "IoU", "macro_f1": "macro-F1"}
NAMES |= {"accuracy": "accuracy", "exact_match": "exact match", "bleu4": "BLEU-4"}
_TIMES = ("ms", "processor ms", "peak MB")
_TRAINING = ("minutes", "passes", "learning rate")


def best_peers(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Task -> the peer with the best main figure, in the order of the tasks."""
    found: dict[str, str] = {}
    for name in [name for name in results if name != UNIHEMA]:
        task = PEERS[name].compared
        if task not in found or _main(results[name], task) > _main(results[found[task]], task):
            found[task] = name
    return {task: found[task] for task in COMPARED if task in found}


def comparison(
    results: Mapping[str, Mapping[str, Any]],
    speed: Mapping[str, Mapping[str, float]],
    checkpoint_minutes: float | None = None,
) -> dict[str, Any]:
    """What the page shows.

    Args:
        results (`Mapping[str, Mapping[str, Any]]`): Of `compare`.
        speed (`Mapping[str, Mapping[str, float]]`): Of `measure`.
        checkpoint_minutes (`float`, *optional*): How long UniHema was trained, all tasks together.

    Returns:
        `dict[str, Any]`: `rows`, one for each peer and each of UniHema's tasks; `sums`, the best peer of each task taken
        together and UniHema doing these tasks; `verdicts`, UniHema's main figure beside the best peer's.
    """
    best, unihema = best_peers(results), results[UNIHEMA]
    rows, verdicts = [], []
    for task in best:
        peers = [name for name in results if name != UNIHEMA and PEERS[name].compared == task]
        if task in unihema["report"]:
            rows.append(_row(task, "UniHema, all tasks in one", unihema, speed.get(unihema_item(task))))
            verdicts.append(_verdict(task, unihema, best[task], results[best[task]]))
        for name in peers:
            row = _row(task, PEERS[name].title, results[name], speed.get(name))
            trained = results[name]["trained"]
            row |= {"minutes": trained["seconds"] / 60, "passes": trained["passes"]}
            rows.append(row | {"learning_rate": results[name]["learning_rate"]})
    members = list(best.values())
    peers_sum = {
        "model": "the best peer of each task: " + ", ".join(members),
        "parameters": sum(results[name]["parameters"] for name in members),
        "minutes": sum(results[name]["trained"]["seconds"] for name in members) / 60,
        **_speed(speed.get(ALL_PEERS)),
    }
    one = {"model": "UniHema", "parameters": unihema["parameters"], "minutes": checkpoint_minutes}
    return {"rows": rows, "sums": [peers_sum, one | _speed(speed.get(UNIHEMA))], "verdicts": verdicts}


def _row(task: str, title: str, result: Mapping[str, Any], speed: Mapping[str, float] | None) -> dict[str, Any]:
    figures = result["report"][task]
    parts = figures.get("datasets", {})
    return {
        "task": task,
        "model": title,
        "figures": _figures(task, figures),
        "datasets": {name: {"value": part[FIGURES[task][0]], "rows": part["rows"]} for name, part in parts.items()},
        "abroad": {
            name: {"rows": part["rows"], "figures": _figures(task, part)}
            for name, part in result.get("abroad", {}).get(task, {}).items()
        },
        "rows": figures["rows"],
        "images": figures["images"],
        "parameters": result["parameters"],
        **_speed(speed),
    }


def _figures(task: str, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    intervals = report.get("intervals") or {}
    return {name: {"value": report[name], "interval": intervals.get(name)} for name in FIGURES[task]}


def _speed(speed: Mapping[str, float] | None) -> dict[str, float | None]:
    return {name: (speed or {}).get(name) for name in ("wall ms", "processor ms", "peak MB")}


def _main(result: Mapping[str, Any], task: str) -> float:
    value = result["report"][task][FIGURES[task][0]]
    return float("-inf") if value is None else value


def _verdict(task: str, unihema: Mapping[str, Any], name: str, peer: Mapping[str, Any]) -> dict[str, Any]:
    own, other = _main(unihema, task), _main(peer, task)
    difference = own - other
    return {
        "task": task,
        "figure": FIGURES[task][0],
        "unihema": own,
        "peer": name,
        "value": other,
        "difference": difference,
        "at_least_as_good": difference >= 0,
    }


def page(compared: Mapping[str, Any], conditions: Mapping[str, Any]) -> str:
    """Markdown of a comparison.

    Args:
        compared (`Mapping[str, Any]`): Of [`comparison`].
        conditions (`Mapping[str, Any]`): `command`, `processor`, `threads`, `load`, `torch`, `transformers`, `folders`,
            `minutes`, `image_sizes`, `seed`, `start`, `device`; `note` where there is more to say.
    """
    had = conditions
    sizes = ", ".join(f"{task} {max(size.values())}" for task, size in had["image_sizes"].items())
    lines = [
        "# UniHema beside single-task peers",
        "",
        f"Written by `{had['command']}`. Every peer was trained for {_number(had['minutes'])} minutes on "
        f"{', '.join(had['folders'])} with UniHema's own batches, augmentation, labels and evaluation: AdamW, cosine by time, "
        f"averaged weights, seed {had['seed']}, on {had['device']}. Longest edge in pixels: {sizes}. The backbone and its start "
        f"({had['start'] or 'random weights'}) are UniHema's, and so are widths, layers, queries and the text model. One run "
        "each, not tuned further: what another seed would change is not in the intervals.",
        "",
        f"Times and memory: {had['processor']}, {had['threads']} thread(s), torch {had['torch']}, Transformers "
        f"{had['transformers']}, float32, one image (one question): the same field for detection and segmentation, the same "
        "cell for the others, and answers as long as the true one. UniHema is prepared with `prepare_for_inference`, and its "
        "tasks on one image share the image's features. Medians of interleaved rounds, without reading the image and making "
        f"results of outputs; the machine's load was {had['load']:.1f} when it began. Memory is the largest of a process that "
        "has the model only, Python and its libraries included.",
        *(("", had["note"]) if had.get("note") else ()),
        "",
        *table(
            ("task", "model", "figures (95 % interval)", "images", "rows", "parameters, M", *_TIMES, *_TRAINING),
            [_cells(row) for row in compared["rows"]],
        ),
        "",
        "All tasks, one after another:",
        "",
        *table(
            ("models", "parameters, M", *_TIMES, "minutes of training"),
            [
                (
                    row["model"],
                    _millions(row["parameters"]),
                    *map(_number, (row["wall ms"], row["processor ms"], row["peak MB"], row["minutes"])),
                )
                for row in compared["sums"]
            ],
        ),
    ]
    if compared["verdicts"]:
        lines += ["", *_verdict_lines(compared["verdicts"])]
    return "\n".join([*lines, *_dataset_lines(compared["rows"]), *_lines_abroad(compared["rows"])]) + "\n"


def _cells(row: Mapping[str, Any]) -> list[Any]:
    cells = [
        row["task"],
        row["model"],
        _figure_cell(row["figures"]),
        row["images"],
        row["rows"],
        _millions(row["parameters"]),
    ]
    cells += [_number(row.get(name)) for name in ("wall ms", "processor ms", "peak MB", "minutes", "passes")]
    rate = row.get("learning_rate")
    return [*cells, "" if rate is None else f"{rate:g}"]


def _figure(name: str, value: float | None, interval: Sequence[float] | None) -> str:
    return f"{NAMES[name]} {shown(value, interval, missing='none', digits=1 if name == 'bleu4' else 3)}"


def _verdict_lines(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    good = sum(verdict["at_least_as_good"] for verdict in verdicts)
    rows = [
        (
            verdict["task"],
            NAMES[verdict["figure"]],
            shown(verdict["unihema"]),
            verdict["peer"],
            shown(verdict["value"]),
            f"{verdict['difference']:+.3f}",
        )
        for verdict in verdicts
    ]
    return [
        f"UniHema is at least as good as the best peer on {good} of {len(verdicts)} tasks:",
        "",
        *table(("task", "figure", "UniHema", "best peer", "its figure", "difference"), rows),
    ]


def _dataset_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
        (
            row["task"],
            name,
            part["rows"],
            row["model"],
            NAMES[FIGURES[row["task"]][0]],
            shown(part["value"], missing="none"),
        )
        for row in rows
        for name, part in row["datasets"].items()
    ]
    if not cells:
        return []
    cells.sort(key=lambda line: line[:2])
    return ["", "By data set:", "", *table(("task", "data", "rows", "model", "figure", "value"), cells)]


def _lines_abroad(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
        (row["task"], name, part["rows"], row["model"], _figure_cell(part["figures"]))
        for row in rows
        for name, part in row.get("abroad", {}).items()
    ]
    if not cells:
        return []
    cells.sort(key=lambda line: line[:2])
    title = "Abroad, all images of data that none of them was trained on:"
    return ["", title, "", *table(("task", "data", "rows", "model", "figures (95 % interval)"), cells)]


def _figure_cell(figures: Mapping[str, Mapping[str, Any]]) -> str:
    return "; ".join(_figure(name, **value) for name, value in figures.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f}"

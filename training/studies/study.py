"""Studies: runs that are each done once, whatever stops them, and then compared and reported.

A study is data for [`run_study`]: a list of [`Run`]s, and a function that makes a [`Report`] of their results.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from unihema.errors import RunConfigError
from unihema.files import exclusive, plain, read_json_object, write_atomically, write_json, write_text
from unihema.training.data.rows import said_once
from unihema.training.run.config import MEANS, RunConfig, flat
from unihema.training.run.distributed import is_main_process, wait_for_everyone


# Of a training run: what it writes, and how it computes. No figure depends on these.
_DECIDE_NOTHING = ("output_dir", "provenance", "logging.", *MEANS)
_DECIDE_YET = ("logging.evaluate_every", "logging.evaluation_samples", "logging.final_samples", "logging.keep_best")


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Args:
        name (`str`): Its name in the study's record.
        settings (`Mapping[str, Any]`): What its figures depend on. A finished run is kept for these settings only.
        measure (`Callable`): From the results of the runs before it, by name, to its own, which JSON can hold; `None` where
            there is nothing to measure. It is called again when it was cut off, so it resumes what it trains by itself.
        leaves (`Path`, *optional*): The file or folder that it leaves. When that is gone the run is done again.
        needs (`Sequence[str]`): Runs whose models it uses; when one of them is done again, so is this one.
    """

    name: str
    settings: Mapping[str, Any]
    measure: Callable[[Mapping[str, Any]], Any]
    leaves: Path | None = None
    needs: Sequence[str] = ()


class Plot(NamedTuple):
    """A picture of a report.

    Args:
        width (`float`): In inches.
        height (`float`): In inches.
        draw (`Callable`): Draws into a `matplotlib.figure.Figure`.
    """

    width: float
    height: float
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class Report:
    """What a study says.

    Args:
        summary (`Mapping[str, Any]`): Stands in `NAME.json` beside the runs.
        lines (`Sequence[str]`): Of `NAME.md`.
        plots (`Mapping[str, Plot]`): File name -> picture.
    """

    summary: Mapping[str, Any]
    lines: Sequence[str]
    plots: Mapping[str, Plot] = field(default_factory=dict)


@said_once()
def run_study(
    folder: str | Path,
    name: str,
    runs: Sequence[Run],
    report: Callable[[Mapping[str, Any]], Report] | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Does the runs of a study that are not done yet, one after another.

    `NAME.json` is written after every run and has all that are finished, also those of earlier calls that are not asked for
    now. `NAME.md` and the plots are drawn from it. A study that is killed at any moment and started again has the figures
    of one that was not.

    Args:
        folder (`str` or `Path`): Where.
        name (`str`): Of the files.
        runs (`Sequence[Run]`): In their order.
        report (`Callable`, *optional*): From the results of the finished runs, by name, to what the study says.
        settings (`Mapping[str, Any]`, *optional*): What the figures of all runs depend on, beside their own settings.
        resume (`bool`): Go on with what an earlier call left.
        overwrite (`bool`): Do all runs again.
        progress (`bool`): Show a progress bar of the runs.

    Returns:
        `dict[str, Any]`: Run -> its result, of all finished runs, as JSON gives it back.

    Raises:
        RunConfigError: A finished run that was made with other settings, a record that cannot be read, or, without `resume`,
            one that has finished runs; what a run left that has to be done again.
        OutputError: Another run is writing into the folder, or it cannot be written.
    """
    with exclusive(Path(folder)) if is_main_process() else nullcontext():
        return _to_the_end(folder, name, runs, report, settings, resume, overwrite, progress)


def _to_the_end(
    folder: str | Path,
    name: str,
    runs: Sequence[Run],
    report: Callable[[Mapping[str, Any]], Report] | None,
    settings: Mapping[str, Any] | None,
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> dict[str, Any]:
    path = Path(folder) / f"{name}.json"
    shared = _as_stored(settings or {})
    record = {"settings": shared, "runs": {}} if overwrite else read_record(folder, name)
    if record["runs"] and not (resume or overwrite):
        raise RunConfigError(
            f"{path} holds {', '.join(record['runs'])} of an earlier run. Go on with it (resume=True), start "
            "anew (--overwrite), or name another folder."
        )
    if record["runs"]:
        _check_same(record["settings"], shared, f"{path} was begun", path)
    record["settings"] = shared
    finished = len(record["runs"])
    for run in runs:
        gone = run.leaves is not None and not run.leaves.exists()
        missing = [name for name in run.needs if name not in record["runs"]]
        if missing and run.leaves is not None and not gone:
            raise RunConfigError(f"{run.leaves} was made from {missing[0]}, which is to be done again: delete it too.")
        if gone or missing:
            record["runs"].pop(run.name, None)
        if run.name in record["runs"]:
            before, place = record["runs"][run.name]["settings"], run.leaves or path
            _check_same(before, _as_stored(run.settings), f"{run.name} in {path} is finished and was made", place)
    if len(record["runs"]) < finished and is_main_process():
        # At once: after a kill what is made anew must not be taken for what was measured before.
        _write(path, record, report)
    try:
        for run in tqdm(runs, desc=name, unit="run", disable=not progress):
            if run.name in record["runs"]:
                continue
            result = run.measure(_results(record))
            if is_main_process() and result is not None:
                record["runs"][run.name] = {"settings": _as_stored(run.settings), "result": _as_stored(result)}
                _write(path, record, report)
            wait_for_everyone()
            if not is_main_process():
                record = read_record(folder, name)
    finally:
        # Also of a study that is stopped: what is finished is shown.
        if record["runs"] and report is not None and is_main_process():
            found = _write(path, record, report)
            for file_name, plot in found.plots.items():
                save_plot(path.with_name(file_name), plot)
    return _results(record)


def read_record(folder: str | Path, name: str) -> dict[str, Any]:
    """What `NAME.json` has: `settings`, and `runs`, each with `settings` and `result`. Empty ones where there is no file.

    Args:
        folder (`str` or `Path`): Of the study.
        name (`str`): Of the study.

    Raises:
        RunConfigError: The file cannot be read.
    """
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        return {"settings": {}, "runs": {}}
    content = read_json_object(path, RunConfigError, "Delete it, and its runs are done again.")
    try:
        runs = {run: {"settings": had["settings"], "result": had["result"]} for run, had in content["runs"].items()}
        return {"settings": dict(content["settings"]), "runs": runs}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunConfigError(f"{path}: cannot be read ({error!r}). Delete it, and its runs are done again.") from error


def figure_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a training run that its figures depend on, by dotted name."""
    return {
        name: value
        for name, value in flat(config.to_dict()).items()
        if name in _DECIDE_YET or not name.startswith(_DECIDE_NOTHING)
    }


def _results(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: run["result"] for name, run in record["runs"].items()}


def _as_stored(value: Any) -> Any:
    """A value as it comes back from JSON, so that what is read and what is new are alike."""
    return json.loads(json.dumps(plain(value)))


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: str, place: Path) -> None:
    before, now = flat(dict(before)), flat(dict(now))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise RunConfigError(
            f"{where} with {name}={before.get(name)!r}; now it is {now.get(name)!r}. Keep the setting, name another output "
            f"folder, or start anew (--overwrite, or delete {place})."
        )


def _write(path: Path, record: Mapping[str, Any], report: Callable[[Mapping[str, Any]], Report] | None) -> Report:
    found = Report({}, ()) if report is None else report(_results(record))
    write_json(path, {**record, **{name: value for name, value in found.summary.items() if name not in record}})
    if found.lines:
        write_text(path.with_suffix(".md"), "\n".join(found.lines) + "\n")
    return found


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table.

    Args:
        header (`Sequence[Any]`): Names of the columns.
        rows (`Sequence[Sequence[Any]]`): Cells.
    """
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def shown(value: float | None, interval: Sequence[float] | None = None, missing: str = "", digits: int = 3) -> str:
    """A figure as a cell of a table, with its interval where it has one."""
    if value is None:
        return missing
    limits = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
    return f"{value:.{digits}f}{limits}"


def save_plot(path: str | Path, plot: Plot) -> None:
    """Draws a picture where matplotlib is installed; nothing where it is not.

    Args:
        path (`str` or `Path`): The PNG file.
        plot ([`Plot`]): What to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    path = Path(path)
    figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
    plot.draw(figure)
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))


__all__ = ["Plot", "Report", "Run", "figure_settings", "read_record", "run_study", "save_plot", "shown", "table"]

"""Cards of checkpoints, adapters and data folders: what is known goes into the templates, as text and never as markup."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jinja2
from huggingface_hub import CardData, DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from unihema.checkpoint_files import ADAPTER_CONFIG, checkpoint_files, read_json
from unihema.errors import CardError, CheckpointError, UniHemaError
from unihema.files import shortened
from unihema.modeling_unihema.tasks import TASK_TABLE

from .check import PLACEHOLDER, check_card, check_metadata, is_repo_id
from .data_record import DataRecord


if TYPE_CHECKING:
    from unihema.modeling_unihema.configuration_unihema import UniHemaConfig

CARD_FILE = "README.md"
TEMPLATES = Path(__file__).parent / "templates"
# The one line of the code in a card that differs between a folder and a repository.
HERE = 'REPO = "."'
TAGS = ["unihema", "hematology", "blood-smear", "microscopy"]
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
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
# An underscore within a word is none of Markdown's.
_MARKUP = re.compile(r"[\\`*~$\[\]<|]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|^[-+#=>]")
_ADDRESS = re.compile(r"https?://[^\s\\`\[\]<>|\"]+")
# Longer patterns nobody reads.
_SHOWN_PATTERN = 100


def checkpoint_card(
    config: "UniHemaConfig",
    metrics: Mapping[str, Any] | None = None,
    *,
    data: DataRecord | None = None,
    run: Mapping[str, Any] | None = None,
    name: str = "A UniHema checkpoint",
    base_model: str | None = None,
    **terms: str | None,
) -> str:
    """The card of a checkpoint. What is not known it says in words, and leaves out of its metadata.

    Args:
        config ([`UniHemaConfig`]): The checkpoint's configuration.
        metrics (`Mapping`, *optional*): `metrics.json`, the report of `evaluate_model` on the validation data: task ->
            figures. `rows` says on how many, `intervals` may have the interval of a figure, `datasets` the same for each
            data set.
        data ([`DataRecord`], *optional*): What it was trained on.
        run (`Mapping`, *optional*): The run's configuration, as in `run_config.json`.
        name (`str`): Its title.
        base_model (`str`, *optional*): Id of the checkpoint that training went on from; the run's when missing and on
            the Hub.
        **terms: `licence` of the weights, as the Hub calls it; for `other` its `licence_name` and `licence_link` as well.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        CardError: An empty field, or a licence that the Hub does not know.
    """
    initial = ((run or {}).get("model") or {}).get("initial_checkpoint")
    if base_model is None and is_repo_id(initial) and not Path(initial).is_dir():
        base_model = initial
    metadata = {"library_name": "transformers", "base_model": base_model, "tags": list(TAGS)}
    return _model_card(
        "checkpoint",
        _trained_tasks(config),
        metadata,
        {"name": name, "metrics": metrics or {}, "data": data or DataRecord(), "run": run or {}, "terms": terms},
        classes=list(config.id2label.values()),
        morphology=config.morphology,
        single_cell_classes=config.single_cell_labels,
        chosen_thresholds=bool(config.trained.detection_thresholds),
    )


def adapter_card(
    adapter: Mapping[str, Any],
    base_model: str,
    task: str,
    *,
    name: str,
    data: DataRecord,
    metrics: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    own_processor: bool = False,
    **terms: str | None,
) -> str:
    """The card of a PEFT adapter: which base it belongs to, what it changes, what was measured with it.

    Args:
        adapter (`Mapping`): Its `adapter_config.json`.
        base_model (`str`): Id of its base on the Hub.
        task (`str`): What it was trained for.
        name (`str`): Title.
        data ([`DataRecord`]): What it was trained on.
        metrics (`Mapping`, *optional*): What was measured with it: task -> figures.
        run (`Mapping`, *optional*): The run's configuration.
        own_processor (`bool`): Whether a processor lies beside it.
        **terms: Licence of the adapter's weights, as for [`checkpoint_card`].

    Returns:
        `str`: The text of `README.md`.

    Raises:
        CardError: A base that is a folder of one machine, an unknown task, an empty field, or data without a licence.
    """
    if not is_repo_id(base_model):
        raise CardError(
            f"The adapter's base is {base_model!r}, which nobody else has. Push the base first and give its repository: "
            "--base lab/base."
        )
    if task not in TASK_TABLE:
        raise CardError(f"Unknown task {task!r}; choose among {', '.join(TASK_TABLE)}.")
    data.check()
    # The class with the head of the task, where PEFT did not note the one it was trained on.
    noted = (adapter.get("auto_mapping") or {}).get("base_model_class")
    classes = {row.model_class for row in TASK_TABLE.values()} | {"UniHemaForMultiTask"}
    # PEFT takes a pattern or a list of names.
    targets = adapter.get("target_modules") or []
    if isinstance(targets, str) and len(targets) > _SHOWN_PATTERN:
        shown = ["the layers that `target_modules` in `adapter_config.json` matches"]
    else:
        shown = [_code(target) for target in ([targets] if isinstance(targets, str) else sorted(targets))]
    kind = str(adapter["peft_type"])
    metadata = {
        "library_name": "peft",
        "base_model": base_model,
        "base_model_relation": "adapter",
        "tags": [*TAGS, "peft", kind.lower()],
    }
    as_it_is = {
        "checkpoint": jinja2.Template((TEMPLATES / "checkpoint.md.jinja").read_text(encoding="utf-8")),
        "base": base_model,
        "task": TASK_TABLE[task],
        "model_class": noted if noted in classes else TASK_TABLE[task].model_class,
        "targets": shown,
        "trained_in_full": [_code(module) for module in adapter.get("modules_to_save") or []],
    }
    known = {"name": name, "metrics": metrics or {}, "data": data, "run": run or {}, "terms": terms}
    texts = {"kind": kind, "rank": adapter.get("r"), "own_processor": own_processor}
    return _model_card("adapter", [task], metadata, known, as_it_is, **texts)


def dataset_card(
    record: DataRecord,
    tasks: Mapping[str, Mapping[str, int]],
    labels: Mapping[str, Sequence[str]],
    *,
    description: str,
    licence_name: str | None = None,
    licence_link: str | None = None,
) -> str:
    """The card of one data folder.

    Args:
        record ([`DataRecord`]): One data set, with its licence, its origin, and its images of each split.
        tasks (`Mapping[str, Mapping[str, int]]`): Task -> split -> rows.
        labels (`Mapping[str, Sequence[str]]`): Task -> the names that its rows use.
        description (`str`): What the images show, and who annotated them; Markdown.
        licence_name (`str`, *optional*): Name of a licence that the Hub calls `other`.
        licence_link (`str`, *optional*): Where that is to be read.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        CardError: No licence, origin, description, row or image.
    """
    if len(record.sources) != 1:
        raise CardError(f"A dataset card is about one data set, not {len(record.sources)}.")
    (source,) = record.sources
    record.check()
    images = sum(source.images.values())
    if not source.source:
        raise CardError(f"Where {source.name!r} is from is not known; give it: --data-source ADDRESS.")
    if not description.strip():
        raise CardError(f"What {source.name!r} shows is not said; give it: --description TEXT.")
    if not tasks or not images:
        raise CardError(f"{source.name!r} has no images that the readers find; see docs/data.md for the layouts.")
    metadata = DatasetCardData(
        pretty_name=source.name,
        **_licence_fields(source.licence, licence_name, licence_link),
        task_categories=list(dict.fromkeys(TASK_TABLE[task].pipeline for task in tasks)),
        size_categories=next((size for limit, size in _SIZES if images < limit), "1M<n<10M"),
        language="en" if any(TASK_TABLE[task].generates_text for task in tasks) else None,
        source_datasets=[source.hub_id] if source.hub_id else None,
        tags=list(TAGS),
    )
    splits = list(source.images)
    rows = {f"{task} rows": [counts.get(split, 0) for split in splits] for task, counts in tasks.items()}
    return _render(
        "dataset",
        metadata,
        {"description": description.strip(), "first_split": splits[0]},
        name=source.name,
        splits=splits,
        contents={"images": list(source.images.values()), **rows},
        leakage=record.leakage,
        labels={task: names for task, names in labels.items() if names},
        source=source.source,
        licence=licence_name or source.licence,
    )


def folder_card(
    folder: str | Path,
    *,
    licence: str | None,
    name: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    data_licences: Mapping[str, str] | None = None,
    data_sources: Mapping[str, str] | None = None,
    base_model: str | None = None,
    task: str | None = None,
) -> str:
    """A card that may be published, of a checkpoint or an adapter on this disk.

    It is written from `config.json` or `adapter_config.json`, and where they are there from `metrics.json`,
    `run_config.json` and `data.json`.

    Args:
        folder (`str` or `Path`): The checkpoint or adapter.
        licence (`str`, *optional*): Of the weights, as the Hub calls it; only the user knows it.
        name (`str`, *optional*): Title; the folder's name when missing.
        licence_name (`str`, *optional*): Name of a licence that the Hub calls `other`.
        licence_link (`str`, *optional*): Where that is to be read.
        data_licences (`Mapping[str, str]`, *optional*): Name of a data set -> its licence, where it is not recorded.
        data_sources (`Mapping[str, str]`, *optional*): Name of a data set -> where it is from.
        base_model (`str`, *optional*): Id of the base checkpoint; an adapter's own when missing.
        task (`str`, *optional*): What an adapter was trained for; what was measured with it when missing.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        CardError: Something that a reader needs is not known; the message says how to give it.
        CheckpointError: The folder is neither checkpoint nor adapter, or not whole.
    """
    folder = Path(folder)
    metrics, run = (
        read_json(folder / file) if (folder / file).is_file() else None for file in ("metrics.json", "run_config.json")
    )
    record = DataRecord.of_checkpoint(folder).with_terms(data_licences or {}, data_sources or {})
    record.check()
    if licence is None:
        raise CardError(
            "The licence of the weights is not known; give it: --license LICENCE. It must be one that the data allow: "
            + ", ".join(f"{source.name} ({source.licence})" for source in record.sources)
            + "."
        )
    told: dict[str, Any] = {"name": name or folder.resolve().name, "metrics": metrics, "data": record, "run": run}
    told |= {"licence": licence, "licence_name": licence_name, "licence_link": licence_link}
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = read_json(folder / ADAPTER_CONFIG)
        measured = [found for found in metrics or {} if found in TASK_TABLE]
        if task is None and len(measured) != 1:
            raise CardError(f"{folder}: what the adapter was trained for is not recorded; give it: --task TASK.")
        base = base_model or adapter.get("base_model_name_or_path") or ""
        own = (folder / "processor_config.json").is_file()
        with _form_of_files(folder):
            text = adapter_card(adapter, base, task or measured[0], own_processor=own, **told)
    else:
        from unihema.modeling_unihema.configuration_unihema import UniHemaConfig

        checkpoint_files(folder)
        try:
            config = UniHemaConfig.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(f"{folder / 'config.json'}: cannot be used ({shortened(error)})") from error
        stray = [found for found in metrics or {} if found not in _trained_tasks(config)]
        if stray:
            raise CardError(
                f"{folder / 'metrics.json'} measures {stray[0]}, which this checkpoint was not trained for: it is of "
                "another one. Measure again with `unihema evaluate`."
            )
        with _form_of_files(folder):
            text = checkpoint_card(config, base_model=base_model, **told)
    check_card(text, source=f"card of {folder}")
    return text


@contextmanager
def _form_of_files(folder: Path) -> Iterator[None]:
    """Figures and settings of another form than `unihema train` writes are an error of their files."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, UniHemaError):
            raise
        raise CardError(
            f"{folder}: metrics.json, run_config.json or {ADAPTER_CONFIG} has another form ({shortened(repr(error))}). Copy "
            "them again, or delete the first two."
        ) from error


def as_text(value: Any) -> Any:
    """What a template writes of a value: every text in it on one line, and read as text by Markdown.

    ```python
    >>> as_text("<b>5 | 6</b>")
    '\\\\<b>5 \\\\| 6\\\\</b>'

    ```

    Args:
        value (`Any`): A text, or texts and other values in mappings and sequences. A text that is an address and nothing
            else stays as it is.
    """
    if isinstance(value, str):
        line = " ".join(value.split())
        if _ADDRESS.fullmatch(line):
            return line
        # At its beginning, a number and a dot would make a list.
        return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", _MARKUP.sub(r"\\\g<0>", line))
    if isinstance(value, Mapping):
        return {as_text(key): as_text(item) for key, item in value.items()}
    return [as_text(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_replaceable(path: Path) -> None:
    """Checks that a card may be written over: that there is none, or one that was generated.

    Raises:
        CardError: Somebody wrote it by hand.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text and HERE not in text and PLACEHOLDER not in text.lower():
        raise CardError(f"{path}: somebody wrote this file by hand. Replace it with --overwrite, or move it first.")


def for_repo(text: str, repo_id: str) -> str:
    """A card whose code names a repository instead of the folder it lies in."""
    return re.sub(rf"^{re.escape(HERE)}$", f'REPO = "{repo_id}"', text, flags=re.M)


def stale_result(results: Sequence[EvalResult] | None, metrics: Mapping[str, Any] | None) -> str | None:
    """What a card says otherwise than `metrics.json` does; nothing where they agree or one of them is missing."""
    for result in results or () if metrics else ():
        figures = dict(_figures(metrics.get(result.task_name) or {}))
        name = next((name for name, (_, shown) in METRICS.items() if shown == result.metric_name), None)
        if name in figures and round(figures[name], 4) != result.metric_value:
            return f"its {result.task_name} {name} is {result.metric_value}, that of metrics.json {figures[name]:.4f}"
    return None


def _model_card(
    template: str,
    tasks: Sequence[str],
    metadata: Mapping[str, Any],
    known: Mapping[str, Any],
    as_it_is: Mapping[str, Any] | None = None,
    **texts: Any,
) -> str:
    """A card from what is known of every model: `name`, `metrics`, `data`, `run` and the `terms` of its licence."""
    metrics, record, run = known["metrics"], known["data"], known["run"]
    licence = _licence_fields(**known["terms"])
    results = _eval_results(metrics, record, (run.get("data") or {}).get("val_split") or "val")
    figures = (METRICS[name][0] for values in metrics.values() for name, _ in _figures(values) if name in METRICS)
    card_data = ModelCardData(
        pipeline_tag=next(row.pipeline for task, row in TASK_TABLE.items() if task in tasks),
        datasets=[source.hub_id for source in record.sources if source.hub_id] or None,
        metrics=list(dict.fromkeys(figures)) or None,
        eval_results=results or None,
        model_name=known["name"] if results else None,
        **licence,
        **metadata,
    )
    return _render(
        template,
        card_data,
        as_it_is or {},
        name=known["name"],
        tasks=tasks,
        pipelines={task: row.pipeline for task, row in TASK_TABLE.items()},
        sources=[{**vars(source), "hub_id": source.hub_id} for source in record.sources],
        leakage=record.leakage,
        run=run,
        measured=list(_measured_rows(metrics)),
        licence=licence,
        **texts,
    )


def _render(template: str, card_data: CardData, as_it_is: Mapping[str, Any], **texts: Any) -> str:
    """Fills in a template: `texts` so that Markdown reads them as text, `as_it_is` what is Markdown or code."""
    check_metadata(card_data.to_dict())
    card_class = DatasetCard if isinstance(card_data, DatasetCardData) else ModelCard
    path = str(TEMPLATES / f"{template}.md.jinja")
    return f"{card_class.from_template(card_data, template_path=path, **as_text(texts), **as_it_is)}\n"


def _licence_fields(
    licence: str | None = None, licence_name: str | None = None, licence_link: str | None = None
) -> dict[str, str | None]:
    if licence is None:
        return {}
    if licence != "other":
        return {"license": licence}
    link = quote(licence_link, safe="/:?#@!$&'*+,;=%~") if licence_link else None
    return {"license": licence, "license_name": licence_name, "license_link": link}


def _trained_tasks(config: "UniHemaConfig") -> list[str]:
    """What a checkpoint was trained for; all that its head does where that is not recorded."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    # The other name of the same class.
    architecture = "UniHemaForDetection" if architecture == "UniHemaForObjectDetection" else architecture
    head = [name for name, task in TASK_TABLE.items() if task.model_class == architecture] or list(TASK_TABLE)
    return [task for task in head if task in (config.trained.tasks or head)]


def _figures(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures of a whole task, without those of its classes, attributes and questions."""
    morphology = {f"morphology {name}": value for name, value in (values.get("morphology") or {}).items()}
    for name, value in {**values, **morphology}.items():
        if isinstance(value, float) and math.isfinite(value):
            yield name, value


def _measured_rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each measured task, and for each data set of several."""
    for task, values in metrics.items():
        parts = values.get("datasets") or {}
        for name, part in {task: values, **{f"{task}, {data}": part for data, part in parts.items()}}.items():
            intervals = part.get("intervals") or {}
            shown = []
            for figure, value in _figures(part):
                between = " ({:.3f} to {:.3f})".format(*intervals[figure]) if intervals.get(figure) else ""
                shown.append(f"{figure} {value:.3f}{between}")
            if shown:
                rows = part.get("rows", "not counted")
                yield {"name": name, "rows": rows, "figures": shown, "intervals": bool(intervals)}


def _eval_results(metrics: Mapping[str, Any], record: DataRecord, split: str) -> list[EvalResult]:
    """The figures as the Hub indexes them; none where it is not known on which data they were measured."""
    if not record.sources:
        return []
    names = " + ".join(source.name for source in record.sources)
    identifier = record.sources[0].hub_id if len(record.sources) == 1 else None
    return [
        EvalResult(
            task_type=TASK_TABLE[task].pipeline,
            task_name=task,
            dataset_type=identifier or names.lower().replace(" ", "-"),
            dataset_name=names,
            dataset_split=split,
            dataset_args={"rows": values["rows"]} if "rows" in values else None,
            metric_type=METRICS[name][0],
            metric_name=METRICS[name][1],
            metric_value=round(value, 4),
            metric_args={"interval": list(values["intervals"][name])}
            if name in (values.get("intervals") or {})
            else None,
        )
        for task, values in metrics.items()
        for name, value in _figures(values)
        if name in METRICS and task in TASK_TABLE
    ]


def _code(text: str) -> str:
    """A span of code: the only thing in it that Markdown reads is a backtick."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


__all__ = [
    "CARD_FILE",
    "adapter_card",
    "as_text",
    "check_replaceable",
    "checkpoint_card",
    "dataset_card",
    "folder_card",
    "for_repo",
    "stale_result",
]

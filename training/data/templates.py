"""Questions and sentences that are templated from labels: nobody wrote them, and they ask only what the labels answer truly.

Of a field: whether and how often cells of a kind are there, stages of malaria, per cent of infected red cells. Of a crop: what
it shows. What a data set does not annotate is not asked, nor what crowds, or cells without a type, leave open.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from unihema.errors import DatasetError
from unihema.modeling_unihema.configuration_unihema import ancestors
from unihema.processing_unihema.class_names import (
    INFECTED,
    PLATELET,
    RED_CELL,
    RED_CELL_SHAPES,
    STANDARD_PARENTS,
    UNINFECTED,
    WHITE_CELL,
    cell_kind,
    usual_name,
)
from unihema.training.data.class_tree import known_parents, with_covered_parents
from unihema.training.data.rows import PROVENANCE_KEYS, Row
from unihema.training.data.shards import LazyRows


STAGES = ("ring", "trophozoite", "schizont", "gametocyte")
# What a field's label says of acute lymphoblastic leukaemia.
_LEUKAEMIA = {"all benign": "benign", "all early": "early", "all pre": "pre", "all pro": "pro"}
_KINDS = {"rbc": "red blood cells", "wbc": "white blood cells", "platelet": "platelets"}
_KIND_OF_CELL = {WHITE_CELL: "A white blood cell.", RED_CELL: "A red blood cell.", PLATELET: "A platelet."}
_WHITE_TYPES = ("neutrophil", "eosinophil", "basophil", "lymphocyte", "monocyte", "myeloblast", "lymphoblast")
_SHAPES = frozenset(map(usual_name, RED_CELL_SHAPES))


def texts_of_labels(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Questions and sentences about the images of a data set.

    Args:
        rows (`Mapping[str, Sequence[Row]]`): Task -> rows of one data set, in memory; those of detection and single cells count.

    Returns:
        `dict[str, list[Row]]`: Rows of `question_answering` and `cloze`.

    Raises:
        DatasetError: The rows are of shards.
    """
    found: dict[str, list[Row]] = {"question_answering": [], "cloze": []}
    for task, texts_of in (("detection", field_texts), ("single_cell", cell_texts)):
        of_task = rows.get(task, ())
        if isinstance(of_task, LazyRows):
            raise DatasetError(
                "data.questions_from_labels: of shards none are made; name the folder that they were made of."
            )
        for row in of_task:
            if "box" in row or row.get("from_attributes"):
                continue
            kept = {key: row[key] for key in ("image", "file_name", "dataset", *PROVENANCE_KEYS) if key in row}
            questions, sentences = texts_of(row)
            for question, answer in questions:
                found["question_answering"].append(
                    kept | {"task": "question_answering", "question": question, "answer": answer}
                )
            for masked, completed in sentences:
                found["cloze"].append(kept | {"task": "cloze", "masked": masked, "completed": completed})
    return found


def cell_texts(row: Row) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What the label of a crop, or of a whole small field, answers.

    Returns:
        `tuple`: Questions with answers, and sentences with a blank with the whole ones.
    """
    label = usual_name(row["label"])
    if label in _LEUKAEMIA:
        stage = _LEUKAEMIA[label]
        return (
            [
                ("Does the field show acute lymphoblastic leukaemia?", _yes(stage != "benign")),
                ("Which class of lymphoid cells does the field show?", f"{stage.capitalize()}."),
            ],
            _blanked("The field shows lymphoid cells of the class {}.", stage),
        )
    questions, sentences = [], []
    line, kind = [label, *ancestors(label, STANDARD_PARENTS)], cell_kind(label)
    if kind in _KIND_OF_CELL:
        questions.append(("What kind of cell is this?", _KIND_OF_CELL[kind]))
    if INFECTED in line or label == UNINFECTED:
        infected = INFECTED in line
        questions.append(("Is the red blood cell infected with malaria?", _yes(infected)))
        sentences += _blanked("The red blood cell is {}.", "infected" if infected else "not infected")
    if label in STAGES:
        questions.append(("Which stage of the parasite does the red blood cell hold?", f"{label.capitalize()}."))
        sentences += _blanked("The red blood cell holds a parasite of the stage {}.", label)
    if kind == WHITE_CELL and label != "wbc":
        questions.append(("Is the cell a blast?", _yes("blast" in line)))
        if label in _WHITE_TYPES:
            questions.append(("What type of white blood cell is this?", f"{label.capitalize()}."))
            sentences += _blanked("The white blood cell is of the type {}.", label)
    if label in _SHAPES or label == "sickle cell":
        questions.append(("Is this a sickle cell?", _yes(label == "sickle cell")))
        questions.append(("Which shape does the red blood cell have?", f"{label.capitalize()}."))
        sentences += _blanked("The red blood cell is of the shape {}.", label)
    return questions, sentences


def field_texts(row: Row) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What the boxes of a field answer.

    Red cells are too many to count in words, which detection does.

    Returns:
        `tuple`: Questions with answers, and sentences with a blank with the whole ones.
    """
    counts = _certain_counts(row)
    questions, sentences = [], []
    for name in ("wbc", "platelet"):
        if name in counts:
            word = _KINDS[name]
            questions += [
                (f"How many {word} are in the field?", f"{counts[name]}."),
                (f"Are there {word} in the field?", _yes(counts[name] > 0)),
            ]
            sentences += _blanked(f"The number of {word} in the field is {{}}.", str(counts[name]))
    types = {name: counts[name] for name in _WHITE_TYPES if name in counts}
    questions += [(f"Is there {_article(name)} {name} in the field?", _yes(count > 0)) for name, count in types.items()]
    if counts.get("wbc") == 1 and sum(types.values()) == 1:
        (only,) = (name for name, count in types.items() if count)
        questions.append(("What type of white blood cell is this?", f"{only.capitalize()}."))
        sentences += _blanked("The only white blood cell in the field is of the type {}.", only)
    if all(stage in counts for stage in STAGES):
        seen = [stage for stage in STAGES if counts[stage]]
        infected = sum(counts[stage] for stage in STAGES)
        questions += [
            ("Are there malaria parasites in the field?", _yes(infected > 0)),
            ("How many red blood cells hold a parasite?", f"{infected}."),
            ("Which stages of the parasite are seen?", f"{', '.join(seen).capitalize() or 'None'}."),
        ]
        sentences += _blanked("The number of red blood cells with a parasite is {}.", str(infected))
        if counts.get("rbc"):
            # Gametocytes do not count in a parasitaemia.
            share = 100 * (infected - counts["gametocyte"]) / counts["rbc"]
            questions.append(("What is the parasitaemia?", f"{share:.1f} per cent."))
            sentences += _blanked("The parasitaemia is {} per cent.", f"{share:.1f}")
    return questions, sentences


def _certain_counts(row: Row) -> dict[str, int]:
    """How many cells of each class a field has, by usual names, for the classes of which the labels say so for sure."""
    if row.get("annotated_classes") is None:
        return {}
    names = list(dict.fromkeys(map(usual_name, row["annotated_classes"])))
    everything = [*names, *(name for name in ("wbc", "rbc") if name not in names)]
    parents = known_parents(everything)
    annotated = with_covered_parents(names, parents)
    objects = row["objects"]
    crowds = objects.get("iscrowd") or [0] * len(objects["bbox"])
    exact = set(map(usual_name, row.get("exact_classes") or ()))
    cells = [(usual_name(name), crowd) for name, crowd in zip(objects["category"], crowds, strict=True)]
    lines = {name: {name, *ancestors(name, parents)} for name, _ in cells}
    counts = {}
    for asked in annotated:
        coarser = set(ancestors(asked, parents)) - exact
        open_cells = any(name in coarser or (crowd and _related(asked, name, parents)) for name, crowd in cells)
        if not open_cells:
            counts[asked] = sum(asked in lines[name] for name, crowd in cells if not crowd)
    return counts


def _related(one: str, other: str, parents: Mapping[str, str]) -> bool:
    return one == other or one in ancestors(other, parents) or other in ancestors(one, parents)


def _blanked(template: str, word: str) -> list[tuple[str, str]]:
    return [(template.format("<extra_id_0>"), template.format(word))]


def _yes(true: Any) -> str:
    return "Yes." if true else "No."


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


__all__ = ["cell_texts", "field_texts", "texts_of_labels"]

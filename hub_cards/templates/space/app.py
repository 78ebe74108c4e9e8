"""A Gradio Space: blood smears in; cells, differential and answers out.

`unihema card --space` puts it beside a checkpoint. What an image, a checkpoint or a visitor says is shown as
text, never as markup.
"""

import json
import os
import tempfile
import time
import zipfile
from pathlib import Path


# Nobody else is told of a visitor.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from PIL import Image

from unihema import Analyzer, InputError, SmearResult, UniHemaError
from unihema.files import open_image
from unihema.processing_unihema.image_io import image_size
from unihema.result_folder import COUNT_COLUMNS, count_rows, csv_lines, file_name
from unihema.results.export import cell_columns, cell_row


MOST_BYTES, MOST_PIXELS = 32 << 20, 64_000_000
MOST_IMAGES, MOST_QUESTIONS = 50, 10
# Cells that are named with an answer.
MOST_SHOWN = 3
# Seconds for which files of visitors are kept.
KEPT = 3600
ENDINGS = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"]
ANSWERS = ["question", "answer", "cells", "the surest of them", "read with care"]

analyzer = Analyzer.from_pretrained(Path(__file__).parent / "checkpoint")
attributes = list(analyzer.model.config.morphology)
cell_names = cell_columns(attributes)
zips = Path(tempfile.mkdtemp(prefix="unihema-"))


def look(path: str) -> tuple[SmearResult, Image.Image]:
    """The result of an image within the limits, which names the file and not its place on the server; and its overlay."""
    if os.path.getsize(path) > MOST_BYTES:
        raise InputError(f"{path}: larger than {MOST_BYTES >> 20} MB.")
    height, width = image_size(path)
    if height * width > MOST_PIXELS:
        raise InputError(f"{path}: more than {MOST_PIXELS // 1_000_000} million pixels.")
    result = analyzer(path)
    result.image = Path(path).name
    return result, result.overlay(open_image(path).pixels)


def cells_of(result: SmearResult) -> list[list]:
    """Rows of `cells.csv`."""
    return [list(cell_row(result, cell, attributes).values()) for cell in result.cells]


def counts_of(result: SmearResult) -> list[list]:
    """Rows of `counts.csv`."""
    return [list(row.values()) for row in count_rows(result)]


def shown(cell: dict) -> str:
    """A cell that supports an answer."""
    attributes = "".join(f", {name} {found['value']}" for name, found in cell.get("attributes", {}).items())
    return f"{cell['label']} {cell['score']:.2f} at {', '.join(f'{side:.0f}' for side in cell['box'])}{attributes}"


def answers_of(path: str, questions: str) -> list[list[str]]:
    """A row for each line of the questions: the answer, and what supports it."""
    asked = [line.strip() for line in questions.splitlines() if line.strip()]
    if len(asked) > MOST_QUESTIONS:
        raise InputError(f"{len(asked)} questions; {MOST_QUESTIONS} at most.")
    return [
        [
            each.question,
            each.answer,
            ", ".join(f"{count} {label}" for label, count in each.counts.items()),
            "; ".join(shown(cell) for cell in sorted(each.cells, key=lambda cell: -cell["score"])[:MOST_SHOWN]),
            " ".join(filter(None, (each.disagreement, each.note))),
        ]
        for each in (analyzer.ask(path, asked) if asked else ())
    ]


def wrong(error: Exception, path: str) -> str:
    """What was wrong with an image."""
    return str(error).replace(path, Path(path).name) or type(error).__name__


def analyze(path: str | None, questions: str):
    """Overlay, differential, cells, answers, and what has to be known of one image."""
    if not path:
        return None, [], [], [], "Choose an image."
    try:
        result, overlay = look(path)
        answers = answers_of(path, questions)
    except (UniHemaError, OSError, MemoryError) as error:
        return None, [], [], [], wrong(error, path)
    counts, cells = ([row[1:] for row in rows] for rows in (counts_of(result), cells_of(result)))
    return overlay, [row[:-1] for row in counts], cells, answers, "\n".join(result.warnings)


def analyze_all(paths: list[str] | None, progress=gr.Progress()):  # noqa: B008
    """A zip file of the tables and overlays of many images, and what could not be analysed."""
    if not paths or len(paths) > MOST_IMAGES:
        return None, f"Choose 1 to {MOST_IMAGES} images."
    for old in zips.iterdir():
        if old.stat().st_mtime < time.time() - KEPT:
            old.unlink()
    cells, counts, results, failed, names = [], [], [], {}, set()
    descriptor, name = tempfile.mkstemp(".zip", "results-", zips)
    with open(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, path in enumerate(progress.tqdm(paths), 1):
            # Images of several folders may have one name; their rows are told apart by it.
            image = Path(path).name if Path(path).name not in names else f"{number:02d}_{Path(path).name}"
            names.add(image)
            try:
                result, overlay = look(path)
            except (UniHemaError, OSError, MemoryError) as error:
                failed[image] = wrong(error, path)
                continue
            result.image = image
            cells += cells_of(result)
            counts += counts_of(result)
            results.append(result.to_dict())
            with archive.open(f"{number:02d}_{file_name(Path(path).stem, 'overlay')}.png", "w") as picture:
                overlay.save(picture, "PNG")
        archive.writestr("cells.csv", "".join(csv_lines(cell_names, iter(cells))))
        archive.writestr("counts.csv", "".join(csv_lines(COUNT_COLUMNS, iter(counts))))
        archive.writestr("results.json", json.dumps({"failed": failed, "images": results}, indent=1))
    return name, "\n".join([f"{len(results)} analysed, {len(failed)} failed.", *failed.values()])


def table(label: str, headers: list[str], wrap: bool = False) -> gr.Dataframe:
    """A table whose values are text."""
    return gr.Dataframe(label=label, headers=headers, datatype="str", interactive=False, wrap=wrap)


with gr.Blocks(title="UniHema", delete_cache=(KEPT, KEPT)) as demo:
    gr.Markdown("# Blood smears\nFor research. It is not a medical device. Upload nothing that names a patient.")
    with gr.Tab("One image"):
        with gr.Row():
            with gr.Column():
                image = gr.File(label="Image", file_types=ENDINGS)
                questions = gr.Textbox(
                    label="Questions, one a line", placeholder="How many neutrophils are there?", lines=3
                )
                one = gr.Button("Analyse", variant="primary")
            overlay = gr.Image(label="Cells", format="png", interactive=False, buttons=["download", "fullscreen"])
        notes = gr.Textbox(label="Notes", interactive=False, lines=2)
        outputs = [
            overlay,
            table("Differential", COUNT_COLUMNS[1:-1]),
            table("Cells", cell_names[1:]),
            table("Answers", ANSWERS, wrap=True),
            notes,
        ]
        one.click(analyze, [image, questions], outputs, api_name="analyze")
    with gr.Tab("Many images"):
        images = gr.File(label=f"Images, {MOST_IMAGES} at most", file_types=ENDINGS, file_count="multiple")
        many = gr.Button("Analyse", variant="primary")
        results = gr.File(label="Tables and overlays", interactive=False)
        said = gr.Textbox(label="Notes", interactive=False, lines=2)
        many.click(analyze_all, images, [results, said], api_name="batch")

if __name__ == "__main__":
    # Fonts of the visitor's system: nothing is fetched from elsewhere for them.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    demo.queue(max_size=20).launch(theme=theme, max_file_size=MOST_BYTES)

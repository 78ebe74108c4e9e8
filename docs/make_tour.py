"""The pictures of docs/tour.md: what each step of the model holds for one image and one question.

`python docs/make_tour.py` writes docs/images/tour_*.png from the open weights and an example smear that come with the package.
Every number drawn is what a module put out; nothing is computed for the picture but colours and sums.
"""

import argparse
import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn

from unihema import Analyzer, UniHemaForMultiTask, UniHemaProcessor
from unihema.shipped import copy_examples, lay_down_checkpoint


IMAGE, OTHER_IMAGE = "white_cell_1.jpg", "white_cell_2.jpg"
QUESTION = "What is the shape of the nucleus?"
IMAGES = Path(__file__).parent / "images"
# Of a file, in bytes.
LARGEST = 150_000
LEVEL_COLORS = ("#d52b1e", "#0072b2", "#000000", "#940094")
CLASS_COLORS = {"RBC": "#d52b1e", "WBC": "#0072b2", "Platelets": "#00875a"}


@dataclass
class Subject:
    """What the tour looks at, and with what.

    Attributes:
        model ([`UniHemaForMultiTask`]): The shipped checkpoint, with attention that returns its weights.
        processor ([`UniHemaProcessor`]): Its processor.
        analyzer ([`Analyzer`]): The same checkpoint as users load it.
        path (`Path`): The example smear.
        other (`Path`): Another one.
    """

    model: UniHemaForMultiTask
    processor: UniHemaProcessor
    analyzer: Analyzer
    path: Path
    other: Path

    @property
    def photograph(self) -> Image.Image:
        """The example smear."""
        return Image.open(self.path).convert("RGB")

    def tokens(self, ids: torch.Tensor) -> list[str]:
        """The pieces of text behind token ids `[L]`, as they are read."""
        return [
            piece.replace("▁", "_").replace("</s>", "end")
            for piece in self.processor.tokenizer.convert_ids_to_tokens(ids)
        ]


@contextmanager
def recorded(*modules: nn.Module) -> Iterator[list[list]]:
    """What modules put out while the context is open: a list of outputs for each."""
    outputs: list[list] = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        for module, kept in zip(modules, outputs)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def as_colors(vectors: torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Vectors `[h * w, d]` of a map as colours `[h, w, 3]`: their three main directions as red, green and blue."""
    centred = vectors - vectors.mean(0)
    main = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    low, high = main.quantile(0.02, 0), main.quantile(0.98, 0)
    return ((main - low) / (high - low)).clamp(0, 1).numpy().reshape(*shape, 3)


def panels(count: int, rows: int = 1, size: float = 3.0, extra: float = 0.45) -> tuple[Figure, list]:
    """A figure of square panels without axes."""
    columns = -(-count // rows)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, (size + extra) * rows), squeeze=False)
    axes = list(axes.flat)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def show_photograph(axis, subject: Subject, title: str = "") -> None:
    """The photograph in the coordinates of the image: 0..1 from its upper left corner."""
    axis.imshow(subject.photograph, extent=(0, 1, 1, 0), aspect=subject.photograph.height / subject.photograph.width)
    axis.set_title(title, fontsize=10)


def draw_box(axis, box: Sequence[float], **style) -> None:
    """A box cxcywh in 0..1."""
    x, y, w, h = map(float, box)
    axis.add_patch(Rectangle((x - w / 2, y - h / 2), w, h, fill=False, clip_on=True, **style))


def processed(subject: Subject) -> Figure:
    """The image as it lies in its file, and as the processor gives it to the model."""
    figure, axes = panels(3)
    axes[0].imshow(subject.photograph)
    axes[0].set_title("in the file: {} x {} pixels".format(*subject.photograph.size), fontsize=10)
    for axis, task in zip(axes[1:], ("detection", "question_answering")):
        inputs = subject.processor.image_processor(subject.photograph, task=task)
        pixels = (inputs["pixel_values"][0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
        padding = inputs["pixel_mask"][0].numpy() == 0
        axis.imshow(np.where(padding[..., None], 1.0, pixels))
        axis.contourf(padding, levels=[0.5, 1.5], colors="none", hatches=["////"])
        what = "for fields" if task == "detection" else "for single cells and questions"
        axis.set_title(f"{what}: {padding.shape[1]} x {padding.shape[0]}", fontsize=10)
    return figure


def levels(subject: Subject) -> Figure:
    """The four feature levels before and after the image encoder."""
    inputs = subject.processor(images=subject.photograph, task="detection")
    features = subject.model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"])
    figure, axes = panels(8, rows=2)
    rows = {"backbone and projection": features.levels.tokens[0], "image encoder": features.last_hidden_state[0]}
    for row, (name, tokens) in enumerate(rows.items()):
        start = 0
        for level, (h, w) in enumerate(features.levels.shapes):
            axis = axes[4 * row + level]
            axis.imshow(as_colors(tokens[start : start + h * w], (h, w)), interpolation="nearest")
            axis.set_title(f"{name}\nlevel {level}: {w} x {h} tokens", fontsize=10)
            start += h * w
    return figure


def found_cells(subject: Subject):
    """The model's trunk and detection head on the photograph, and the queries that end as a cell that is shown."""
    inputs = subject.processor(images=subject.photograph, task="detection")
    with recorded(subject.model.model.query_selection.class_head) as (scored,):
        trunk = subject.model.model(**inputs, task="detection")
    outputs = subject.model(**inputs, task="detection")
    result = subject.analyzer(subject.photograph, ["detection"])
    sides = torch.tensor(subject.photograph.size * 2)
    queries = []
    for cell in result.cells:
        corners = torch.tensor(cell.box) / sides
        box = torch.cat(((corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]))
        queries.append(int((outputs.pred_boxes[0] - box).abs().sum(1).argmin()))
    return trunk, scored[0][0], list(zip(queries, [cell.label for cell in result.cells]))


def scores(subject: Subject) -> Figure:
    """How much each encoded token looks like a cell, and the tokens that become queries."""
    trunk, logits, _ = found_cells(subject)
    inputs = subject.processor(images=subject.photograph, task="detection")
    shapes = subject.model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"]).levels.shapes
    best = logits.sigmoid().amax(-1)
    chosen = torch.zeros(len(best), dtype=torch.bool)
    chosen[trunk.proposal_indices[0]] = True
    figure, axes = panels(4)
    figure.set_layout_engine("constrained")
    start, norm = 0, PowerNorm(0.4, 0, float(best.max()))
    for level, (h, w) in enumerate(shapes):
        part = slice(start, start + h * w)
        drawn = axes[level].imshow(best[part].reshape(h, w), norm=norm, cmap="magma")
        y, x = np.nonzero(chosen[part].reshape(h, w).numpy())
        axes[level].scatter(x, y, s=5, color="white", edgecolors="black", linewidths=0.4)
        axes[level].set_title(f"level {level}: {int(chosen[part].sum())} of {h * w} chosen", fontsize=10)
        start += h * w
    figure.colorbar(drawn, ax=axes, label="best class score of a token")
    return figure


def reference_points(subject: Subject) -> Figure:
    """Where the chosen tokens lie, and the boxes that the best of them start from."""
    trunk, _, cells = found_cells(subject)
    boxes, counts = trunk.proposal_boxes[0], [40 * 40, 20 * 20, 10 * 10]
    level_of = torch.bucketize(trunk.proposal_indices[0], torch.tensor(counts).cumsum(0), right=True)
    figure, axes = panels(2, size=4.2)
    show_photograph(axes[0], subject, f"centres of the boxes of all {len(boxes)} queries")
    for level, color in enumerate(LEVEL_COLORS):
        own = boxes[level_of == level]
        axes[0].scatter(
            own[:, 0], own[:, 1], s=20, color=color, edgecolors="white", linewidths=0.5, label=f"level {level}"
        )
    axes[0].legend(
        loc="lower center", bbox_to_anchor=(0.5, -0.1), ncols=4, fontsize=8, frameon=False, handletextpad=0.1
    )
    axes[0].set(xlim=(0, 1), ylim=(1, 0))
    show_photograph(axes[1], subject, f"boxes at the start of the {len(cells)} queries that become cells")
    for query, _ in cells:
        draw_box(axes[1], boxes[query], color=LEVEL_COLORS[int(level_of[query])], linewidth=1.5)
    return figure


def prompt(subject: Subject) -> Figure:
    """How much the queries read of each token of the prompt, in TextGuidedVisualRefinement."""
    inputs = subject.processor(images=subject.photograph, task="detection")
    refinement = subject.model.model.hema_former.text_guided_visual_refinement
    with recorded(refinement.attention, refinement.gate) as (attended, gates):
        subject.model.model(**inputs, task="detection")
    weights = attended[0][1][0].mean(0).mean(0)
    gate = gates[0].sigmoid()[0]
    figure, (words, channels) = plt.subplots(1, 2, figsize=(12, 3.4), width_ratios=(3, 1))
    pieces = subject.tokens(inputs["input_ids"][0])
    words.bar(range(len(pieces)), weights, color="#0072b2")
    words.set_xticks(range(len(pieces)), pieces, rotation=90, fontsize=9)
    words.set_ylabel("attention, mean of\nqueries and heads")
    words.set_title("A = Attn(k, P(T), P(T)): what the queries read of the prompt", fontsize=10)
    channels.hist(gate.flatten().numpy(), bins=30, range=(0, 1), color="#c96000")
    channels.set_title("g: share of A in k'", fontsize=10)
    channels.set_ylabel("channels of all queries")
    return figure


def decoder(subject: Subject) -> Figure:
    """The boxes of the queries that become cells, layer by layer."""
    trunk, _, cells = found_cells(subject)
    steps = {"query selection": trunk.proposal_boxes[0]}
    steps |= {f"decoder layer {number}": boxes[0] for number, boxes in enumerate(trunk.decoder_boxes, 1)}
    steps[f"decoder layer {len(trunk.decoder_boxes)}"] = end = trunk.decoder_boxes[-1, 0]
    figure, axes = panels(len(steps))
    own = [query for query, _ in cells]
    for axis, (name, boxes) in zip(axes, steps.items()):
        away = float((boxes - end)[own].abs().mean()) * subject.photograph.width
        show_photograph(axis, subject, name if boxes is end else f"{name}: {away:.1f} pixels away")
        for query, label in cells:
            draw_box(axis, boxes[query], color=CLASS_COLORS[label], linewidth=1.3)
    return figure


def mask(subject: Subject) -> Figure:
    """From QueryGuidedMaskFinder's features to the mask."""
    inputs = subject.processor(images=subject.photograph, task="segmentation")
    trunk = subject.model.model(**inputs, task="segmentation")
    logits = subject.model(**inputs, task="segmentation").mask_logits[0]
    result = subject.analyzer(subject.photograph, ["segmentation"])
    width = trunk.mask_features.shape[1] // 2
    features = trunk.mask_features[0, :width] + trunk.mask_features[0, width:]
    h, w = features.shape[1:]
    figure, axes = panels(4)
    axes[0].imshow(as_colors(features.flatten(1).T, (h, w)), interpolation="nearest")
    axes[0].set_title(f"G: {w} x {h}", fontsize=10)
    for axis, values, name in (
        (axes[1], trunk.mask_logits[0, 0], "Y, logits of query 0"),
        (axes[2], logits, "mask head, logits"),
    ):
        bound = float(values.abs().max())
        axis.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound)
        axis.set_title(f"{name}: {values.shape[1]} x {values.shape[0]}", fontsize=10)
    show_photograph(axes[3], subject, f"{result.mask_label}: {100 * result.mask.mean():.1f} % of the image")
    axes[3].contourf(result.mask, levels=[0.5, 1.5], colors=["#00c8c8"], alpha=0.45, extent=(0, 1, 0, 1))
    return figure


def overlay(subject: Subject) -> Figure:
    """What the analyzer shows, and the attributes of the white cell."""
    result = subject.analyzer(subject.photograph)
    drawn = result.overlay(subject.photograph)
    # The legend on the right says less than the table drawn here.
    drawn = drawn.crop((0, 0, drawn.height * subject.photograph.width // subject.photograph.height, drawn.height))
    figure, (axis, table) = plt.subplots(1, 2, figsize=(10.4, 6.6), width_ratios=(6.4, 4))
    axis.imshow(drawn)
    axis.axis("off")
    table.axis("off")
    cell = next(cell for cell in result.cells if cell.attributes)
    lines = [f"{label}: {count}" for label, count in result.counts.items() if count]
    lines += ["", f"{cell.label} {cell.score:.2f}"]
    lines += [
        f"  {name.replace('_', ' ')}: {read['value']} ({read['score']:.2f})" for name, read in cell.attributes.items()
    ]
    table.text(0, 1, "\n".join(lines), va="top", fontsize=10, linespacing=1.6)
    return figure


def single_cell(subject: Subject) -> Figure:
    """The best classes of the single-cell head."""
    inputs = subject.processor(images=subject.photograph, task="single_cell")
    features = subject.model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"], task="single_cell")
    outputs = subject.model(image_features=features, task="single_cell")
    best = outputs.logits[0].softmax(-1).topk(5)
    figure, axes = plt.subplots(1, 3, figsize=(12, 2.9), width_ratios=(1, 2.2, 1.6))
    h, w = features.levels.shapes[0]
    axes[0].imshow(as_colors(features.last_hidden_state[0, : h * w], (h, w)), interpolation="nearest")
    axes[0].set_title(f"encoded tokens, level 0: {w} x {h}", fontsize=10)
    axes[0].set(xticks=[], yticks=[])
    axes[1].bar(range(outputs.features.shape[1]), outputs.features[0], color="#0072b2", width=1)
    axes[1].set_title(f"E_Z: {outputs.features.shape[1]} numbers for the cell", fontsize=10)
    axes[1].set_xlabel("channel")
    labels = [subject.model.config.single_cell_labels[index] for index in best.indices.tolist()]
    axes[2].barh(labels[::-1], best.values.flip(0), color="#00875a")
    axes[2].set(xlim=(0, 1), xlabel="probability")
    axes[2].set_title("single-cell head, best five", fontsize=10)
    return figure


def fusion_weights(subject: Subject) -> tuple[list[str], torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Tokens of the question; attention to text and image `[blocks, L, L]` and `[blocks, L, S]`; shapes of the levels."""
    inputs = subject.processor(images=subject.photograph, text=QUESTION)
    blocks = subject.model.model.hema_former.cross_modal_fusion.blocks
    with recorded(*(part for block in blocks for part in (block.text_attention, block.image_attention))) as outputs:
        subject.model.model(**inputs, task="question_answering")
    weights = [output[0][1][0].mean(0) for output in outputs]
    shapes = subject.model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"]).levels.shapes
    return subject.tokens(inputs["input_ids"][0]), torch.stack(weights[::2]), torch.stack(weights[1::2]), shapes


def question(subject: Subject) -> Figure:
    """The tokens of the question, and what CrossModalFusion's queries read of them."""
    pieces, to_text, _, _ = fusion_weights(subject)
    ids = subject.processor(text=QUESTION, task="question_answering")["input_ids"][0].tolist()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6))
    for number, (axis, weights) in enumerate(zip(axes, to_text), 1):
        axis.imshow(weights, cmap="magma", vmin=0)
        axis.set_xticks(range(len(pieces)), pieces, rotation=90, fontsize=9)
        axis.set_yticks(range(len(pieces)), [f"{piece}  {token}" for piece, token in zip(pieces, ids)], fontsize=9)
        axis.set_title(f"block {number}: row reads column", fontsize=10)
    axes[0].set_ylabel("query 0 to 13: the token it is added to, and the token's id", fontsize=9)
    return figure


def fusion(subject: Subject) -> Figure:
    """Where in the image the query of each token of the question looks."""
    pieces, _, to_image, shapes = fusion_weights(subject)
    size = shapes[0]
    maps = 0
    for level, part in zip(shapes, to_image.split([h * w for h, w in shapes], -1)):
        spread = part.unflatten(-1, level).repeat_interleave(size[0] // level[0], -2)
        maps = maps + spread.repeat_interleave(size[1] // level[1], -1) * (level[0] * level[1]) / (size[0] * size[1])
    figure, axes = panels(len(pieces), rows=2, size=1.6, extra=0.3)
    for axis, piece, weights in zip(axes, pieces, maps.mean(0)):
        axis.imshow(subject.photograph.convert("L"), cmap="gray", extent=(0, 1, 1, 0), alpha=0.75)
        axis.imshow(weights, cmap="magma", alpha=0.6, extent=(0, 1, 1, 0), interpolation="bilinear")
        axis.set_title(piece, fontsize=10)
    return figure


def answer(subject: Subject) -> Figure:
    """The answer, token by token, with the image, with another image, and without any."""
    asked = {
        f"{subject.path.name}": (subject.path, False),
        f"{subject.other.name}": (subject.other, False),
        "the text alone": (subject.path, True),
    }
    figure, axes = plt.subplots(len(asked), 1, figsize=(10, 6.2))
    for axis, (name, (path, text_only)) in zip(axes, asked.items()):
        inputs = subject.processor(images=path, text=QUESTION)
        generated = subject.model.generate(
            **inputs, text_only=text_only, max_new_tokens=32, return_dict_in_generate=True, output_logits=True
        )
        best = torch.stack([step[0].softmax(-1) for step in generated.logits]).topk(3)
        axis.imshow(best.values.T, cmap="Blues", vmin=0, vmax=2, aspect="auto")
        for step, (values, indices) in enumerate(zip(best.values, best.indices)):
            for rank, (value, piece) in enumerate(zip(values.tolist(), subject.tokens(indices))):
                axis.text(step, rank, f"{piece}\n{value:.2f}", ha="center", va="center", fontsize=8.5)
        axis.set(xticks=[], yticks=range(3), yticklabels=["1st", "2nd", "3rd"])
        axis.set_title(f"{name}: {subject.processor.decode_answers(generated.sequences)[0]}", fontsize=10, loc="left")
    return figure


PICTURES = (
    processed,
    levels,
    scores,
    reference_points,
    prompt,
    decoder,
    mask,
    overlay,
    single_cell,
    question,
    fusion,
    answer,
)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG of 256 colours, those of lines and bars among them.

    Raises:
        ValueError: The file would be too large for a repository.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)
    picture = Image.open(drawn).convert("RGB")
    lines = [
        round(255 * value) for color in (*LEVEL_COLORS, *CLASS_COLORS.values(), "white") for value in to_rgb(color)
    ]
    palette = Image.new("P", (1, 1))
    palette.putpalette(picture.quantize(256 - len(lines) // 3).getpalette()[: 768 - len(lines)] + lines)
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; at most {LARGEST}.")


@torch.inference_mode()
def make_tour(folder: Path) -> list[Path]:
    """Draws all pictures.

    Args:
        folder (`Path`): Where to; must exist.

    Returns:
        `list[Path]`: The files, in the order of the tour.
    """
    with tempfile.TemporaryDirectory() as work:
        checkpoint = lay_down_checkpoint(Path(work) / "unihema", weights="open")
        smears = {path.name: path for path in copy_examples(Path(work) / "smears")}
        subject = Subject(
            UniHemaForMultiTask.from_pretrained(checkpoint, attn_implementation="eager").eval(),
            UniHemaProcessor.from_pretrained(checkpoint),
            Analyzer.from_pretrained(checkpoint, device="cpu"),
            smears[IMAGE],
            smears[OTHER_IMAGE],
        )
        paths = []
        for number, draw in enumerate(PICTURES, 1):
            figure = draw(subject)
            if figure.get_layout_engine() is None:
                figure.tight_layout()
            paths.append(folder / f"tour_{number:02}_{draw.__name__}.png")
            save(figure, paths[-1])
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=IMAGES, help="Folder for the pictures.")
    for picture in make_tour(parser.parse_args().output):
        print(picture)

"""Each task beside the same model with every task's parts on, which is what the official code runs on every call."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle

import torch

from benchmarks import models
from benchmarks.measuring import interleaved
from unihema.inference.int8 import to_int8


NEW_TOKENS = 32
WORDS = 7
END = 1
# The official code drafts nothing, and takes four beams.
EACH_TOKEN = {"prompt_lookup_num_tokens": None}
EVERYTHING = "everything, an answer with a pass for each token"


class _Counted:
    """Counts how often a model looks at an image and how often its text decoder runs, call by call of a case."""

    def __init__(self):
        self.now = Counter()
        self.calls: dict[str, list[Counter]] = {}

    def watch(self, model) -> None:
        for part, name in ((model.model.visual_backbone, "images"), (model.get_decoder(), "passes")):
            part.register_forward_hook(lambda *_, name=name: self.now.update([name]))

    def __call__(self, name: str, run: Callable[[], None]) -> Callable[[], None]:
        def counted() -> None:
            self.now.clear()
            run()
            self.calls.setdefault(name, []).append(Counter(self.now))

        return counted

    def mean(self, name: str, what: str) -> float:
        return statistics.mean(call[what] for call in self.calls[name][1:])


def questions() -> Iterator[torch.Tensor]:
    """The same random questions `[1, L]` for every case, another one in every round: how well an answer can be drafted
    depends on it."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 1000, (16, WORDS), generator=generator)
    return cycle(torch.cat((text[None], torch.tensor([[END]])), dim=1) for text in words)


def measure(size: tuple[int, int], rounds: int) -> list[dict]:
    """Rows of the table: processor seconds of each task, and their share of everything with an answer."""
    torch.manual_seed(0)
    model, image = models.unihema("multitask"), torch.randn(1, 3, *size)
    trunk = model.model
    peer = models.blip_vqa()
    # Another model of the same kind: quantising changes it for good.
    small = to_int8(models.unihema("question_answering"))
    counted = _Counted()
    counted.watch(model)
    counted.watch(small)

    def answer(question: torch.Tensor, asked=model, beams: int = 1, **options) -> None:
        if asked is not peer:
            # The case before may have asked the same.
            asked.answer_memory.forget()
        asked.generate(
            input_ids=question,
            pixel_values=image,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            num_beams=beams,
            **options,
        )

    def new_image(question: torch.Tensor, asked=model, **options) -> None:
        asked.model.image_memory.forget()
        answer(question, asked, **options)

    def task_alone(task: str) -> None:
        trunk.image_memory.forget()
        model(task=task, pixel_values=image)

    def everything(question: torch.Tensor, **options) -> None:
        """Every part once, nothing twice: the image's feature levels are shared, as in the official forward pass."""
        trunk.image_memory.forget()
        levels = trunk.image_memory.levels(trunk.visual_backbone, image, None)
        tokens = trunk.image_memory.tokens(trunk.image_encoder, levels)
        model.single_cell_head(trunk.hema_former.single_cell_feature_extraction(tokens, levels))
        mask = torch.ones_like(question)
        text = trunk.text_branch.encode(question, mask).last_hidden_state
        chosen = trunk.query_selection(tokens, levels)
        content = trunk.hema_former.text_guided_visual_refinement(chosen.content, text, mask)
        states, _ = trunk.image_decoder(content, chosen.reference_logits, tokens, levels)
        model.detection_head(states)
        model.mask_head(*trunk.hema_former.query_guided_mask_finder(states[-1, :, :1], tokens, levels), size)
        answer(question, **options)

    def asking(run: Callable, *arguments, **options) -> Callable[[], None]:
        turns = questions()
        return lambda: run(next(turns), *arguments, **options)

    cases = {
        EVERYTHING: asking(everything, **EACH_TOKEN),
        "everything, an answer of 4 beams as in the official code": asking(everything, beams=4),
        "everything, a drafted answer": asking(everything),
        "detection": lambda: task_alone("detection"),
        "segmentation": lambda: task_alone("segmentation"),
        "single cell": lambda: task_alone("single_cell"),
        "question": asking(new_image),
        "question, a pass for each token": asking(new_image, **EACH_TOKEN),
        "second question": asking(answer),
        "second question, a pass for each token": asking(answer, **EACH_TOKEN),
        "question, int8": asking(new_image, small),
        "question to BLIP": asking(answer, peer),
    }
    cases = {name: counted(name, run) for name, run in cases.items()}
    with torch.no_grad():
        timings = interleaved(cases, rounds, f"tasks {size}")
    base = timings[EVERYTHING].processor
    return [
        {
            "size": size,
            "task": name,
            "processor s": timing.processor,
            "share": timing.processor / base,
            "wall s": timing.wall,
            # BLIP has other parts, which are not watched.
            "images looked at": math.nan if "BLIP" in name else counted.mean(name, "images"),
            "passes of the text decoder": math.nan if "BLIP" in name else counted.mean(name, "passes"),
        }
        for name, timing in timings.items()
    ]

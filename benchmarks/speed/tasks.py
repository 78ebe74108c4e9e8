"""Each task beside the same model with every task's parts on, which is what the official code runs on every call."""

import math
from functools import partial

import torch

from benchmarks.measuring import interleaved
from benchmarks.speed import models
from unihema.inference.int8 import to_int8


NEW_TOKENS = 32
WORDS = 7
END = 1
EVERYTHING = "everything"
# A second call that is given the features of the image -> the call that computes them.
SECOND = {"second question, image features given": "question", "segmentation after detection": "detection"}


def measure(size: tuple[int, int], rounds: int) -> list[dict]:
    """Rows of the table: processor seconds of each task, their share of everything with an answer, and of a second task on an
    image its share of the first."""
    torch.manual_seed(0)
    image, question = (
        torch.randn(1, 3, *size),
        torch.cat((torch.randint(3, 1000, (1, WORDS)), torch.tensor([[END]])), 1),
    )
    model = models.prepared_unihema("multitask")
    # Other models of the same kind: what is done to them cannot be undone.
    unprepared, int8 = models.unihema("detection"), to_int8(models.prepared_unihema("question_answering"))
    trunk, peer = model.model, models.blip_vqa()

    def answer(asked=model, **options) -> None:
        asked.generate(input_ids=question, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options)

    def everything(beams: int) -> None:
        """Every part once, nothing twice: the image's feature levels are shared, as in the official forward pass."""
        features = model.get_image_features(image)
        levels, tokens = features.levels, features.last_hidden_state
        model.single_cell_head(trunk.hema_former.single_cell_feature_extraction(tokens, levels))
        prompt = model.get_prompt_features(question)
        chosen = trunk.query_selection(tokens, levels)
        refine = trunk.hema_former.text_guided_visual_refinement
        content = refine(chosen.content, prompt.last_hidden_state, prompt.attention_mask)
        decoded = trunk.image_decoder(content, chosen.reference_logits, tokens, levels)
        model.detection_head(decoded.states)
        model.mask_head(*trunk.hema_former.query_guided_mask_finder(decoded.states[-1, :, :1], tokens, levels), size)
        answer(num_beams=beams, image_features=features)

    with torch.no_grad():
        features = model.get_image_features(image)
        cases = {
            EVERYTHING: partial(everything, beams=1),
            "everything, an answer of 4 beams as in the official code": partial(everything, beams=4),
            "detection": lambda: model(task="detection", pixel_values=image),
            "detection, model not prepared": lambda: unprepared(image),
            "segmentation": lambda: model(task="segmentation", pixel_values=image),
            "segmentation after detection": lambda: model(task="segmentation", image_features=features),
            "single cell": lambda: model(task="single_cell", pixel_values=image),
            "question": lambda: answer(pixel_values=image),
            "second question, image features given": lambda: answer(image_features=features),
            "question, int8": lambda: answer(int8, pixel_values=image),
            "question to BLIP": lambda: answer(peer, pixel_values=image),
        }
        timings = interleaved(cases, rounds, f"tasks {size}")
    return [
        {
            "size": size,
            "task": name,
            "processor s": timing.processor,
            "share": timing.processor / timings[EVERYTHING].processor,
            "share of the first": timing.processor / timings[SECOND[name]].processor if name in SECOND else math.nan,
            "wall s": timing.wall,
        }
        for name, timing in timings.items()
    ]

"""Each task beside the same model with every task's parts on, which is what the official code runs on every call."""

import torch

from benchmarks import models
from benchmarks.measuring import interleaved
from unihema.int8 import to_int8


NEW_TOKENS = 32
QUESTION = torch.tensor([[5, 9, 17, 33, 65, 12, 7, 1]])


def measure(size: tuple[int, int], rounds: int) -> list[dict]:
    """Rows of the table: processor seconds of each task, and their share of everything with an answer."""
    model, image = models.unihema("multitask"), torch.randn(1, 3, *size)
    trunk = model.model
    looks = [0]
    trunk.visual_backbone.register_forward_hook(lambda *_: looks.__setitem__(0, looks[0] + 1))

    peer = models.blip_vqa()
    # Another model of the same kind: quantising changes it for good.
    small = to_int8(models.unihema("question_answering"))

    def answer(asked=model, beams: int = 1, **options) -> None:
        # Otherwise it would be drafted from itself, given a round before.
        asked.answer_memory.forget()
        asked.generate(
            input_ids=QUESTION,
            pixel_values=image,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            num_beams=beams,
            **options,
        )

    def new_image(**options) -> None:
        trunk.image_memory.forget()
        answer(**options)

    def task_alone(task: str) -> None:
        trunk.image_memory.forget()
        model(task=task, pixel_values=image)

    def new_image_int8() -> None:
        small.model.image_memory.forget()
        answer(small)

    def everything(beams: int = 1) -> None:
        """Every part once, nothing twice: the image's feature levels are shared, as in the official forward pass."""
        trunk.image_memory.forget()
        levels = trunk.image_memory.levels(trunk.visual_backbone, image, None)
        tokens = trunk.image_memory.tokens(trunk.image_encoder, levels)
        model.single_cell_head(trunk.hema_former.single_cell_feature_extraction(tokens, levels))
        mask = torch.ones_like(QUESTION)
        text = trunk.text_branch.encode(QUESTION, mask).last_hidden_state
        chosen = trunk.query_selection(tokens, levels)
        content = trunk.hema_former.text_guided_visual_refinement(chosen.content, text, mask)
        states, _ = trunk.image_decoder(content, chosen.reference_logits, tokens, levels)
        model.detection_head(states)
        model.mask_head(*trunk.hema_former.query_guided_mask_finder(states[-1, :, :1], tokens, levels), size)
        answer(beams=beams)

    def blip_answer() -> None:
        peer.generate(
            input_ids=QUESTION, pixel_values=image, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, num_beams=1
        )

    def everything_with_beams() -> None:
        everything(beams=4)

    cases = {
        "everything, with an answer": everything,
        "everything, with an answer of 4 beams": everything_with_beams,
        "detection": lambda: task_alone("detection"),
        "segmentation": lambda: task_alone("segmentation"),
        "single cell": lambda: task_alone("single_cell"),
        "question": new_image,
        "question, a pass for every token": lambda: new_image(prompt_lookup_num_tokens=None),
        "second question": answer,
        "question, int8": new_image_int8,
        "question to BLIP": blip_answer,
    }
    with torch.no_grad():
        timings = interleaved(cases, rounds, f"tasks {size}")
        before = looks[0]
        cases["second question"]()
        again = looks[0] - before
    base = timings["everything, with an answer"].processor
    return [
        {
            "size": size,
            "task": name,
            "processor s": timing.processor,
            "share": timing.processor / base,
            "wall s": timing.wall,
            "image looked at": again if name == "second question" else 1,
        }
        for name, timing in timings.items()
    ]

"""Which parts of the model a run trains. The others stay as they are, to the byte."""

from collections.abc import Sequence

from torch import nn

from unihema.errors import RunConfigError


# Part -> the module of `UniHemaForMultiTask` that holds it; together they hold every parameter.
PARTS = {
    "backbone": "model.visual_backbone.backbone",
    "input_projection": "model.visual_backbone.input_projection",
    "image_encoder": "model.image_encoder",
    "query_selection": "model.query_selection",
    "image_decoder": "model.image_decoder",
    "text_embedding": "model.text_branch.shared",
    "text_encoder": "model.text_branch.encoder",
    "text_decoder": "model.text_branch.decoder",
    "cross_modal_fusion": "model.hema_former.cross_modal_fusion",
    "text_guided_visual_refinement": "model.hema_former.text_guided_visual_refinement",
    "single_cell_feature_extraction": "model.hema_former.single_cell_feature_extraction",
    "query_guided_mask_finder": "model.hema_former.query_guided_mask_finder",
    "detection_head": "detection_head",
    "denoising": "denoising",
    "mask_head": "mask_head",
    "single_cell_head": "single_cell_head",
    "language_head": "lm_head",
}


class TrainedParts:
    """Freezes all but the parts named.

    A frozen part gets no gradient (none is stored, and nothing is kept for one), has no optimizer state, and runs as in
    inference: its dropout is off and its BatchNorm uses, and keeps, the statistics it has.

    Args:
        model (`UniHemaForMultiTask`): Its parameters' `requires_grad` are set; those that a part of a trained part has
            turned off itself (frozen BatchNorm) stay off.
        names (`Sequence[str]`, *optional*): Of [`PARTS`]; `None` trains everything.

    Raises:
        RunConfigError: A part that does not exist or that this model was built without.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None):
        self.frozen: list[str] = []
        if names is None:
            return
        unknown = [name for name in names if name not in PARTS]
        if unknown or not names:
            raise RunConfigError(
                f"model.trained_parts: {f'unknown part {unknown[0]!r}' if unknown else 'empty'}; parts are "
                f"{', '.join(PARTS)}."
            )
        built = dict(model.named_modules())
        missing = [name for name in names if PARTS[name] not in built]
        if missing:
            raise RunConfigError(f"model.trained_parts: this model was built without {', '.join(missing)}.")
        for name, path in PARTS.items():
            if name not in names and path in built:
                self.frozen.append(path)
                built[path].requires_grad_(False)
        trained = [f"{PARTS[name]}." for name in names]
        for name, parameter in model.named_parameters():
            # What belongs to no part, such as a lone parameter of the composite, is not trained either.
            if not name.startswith(tuple(trained)):
                parameter.requires_grad_(False)

    def train(self, model: nn.Module) -> None:
        """Training mode for the trained parts, evaluation mode for the frozen ones."""
        model.train()
        for path in self.frozen:
            model.get_submodule(path).eval()


__all__ = ["PARTS", "TrainedParts"]

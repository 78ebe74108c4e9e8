"""UniHema and its peers with random weights, each as a function of an image size."""

import sys
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measuring import say_peak


LABELS = 30
QUERIES = 900


def _resnet50():
    from transformers import ResNetConfig

    return ResNetConfig(out_features=["stage2", "stage3", "stage4"])


def unihema(task: str = "detection", preset: str = "base", **options) -> nn.Module:
    """A model of ours that builds what `task` needs, or all heads for `multitask`."""
    import unihema as package

    classes = {
        "detection": package.UniHemaForDetection,
        "segmentation": package.UniHemaForSegmentation,
        "single_cell": package.UniHemaForImageClassification,
        "question_answering": package.UniHemaForQA,
        "multitask": package.UniHemaForMultiTask,
    }
    config = getattr(package.UniHemaConfig, preset)(num_labels=LABELS, **options)
    return classes[task](config).eval()


def prepared_unihema(task: str = "detection", preset: str = "base", **options) -> nn.Module:
    """A model of [`unihema`] as [`Analyzer`] runs it."""
    from unihema import prepare_for_inference

    model = unihema(task, preset, **options)
    prepare_for_inference(model)
    return model


def deformable_detr_config():
    """DeformableDetr, two-stage with box refinement, with the layers and queries of our base preset."""
    from transformers import DeformableDetrConfig

    return DeformableDetrConfig(
        backbone_config=_resnet50(),
        two_stage=True,
        with_box_refine=True,
        num_queries=QUERIES,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        num_labels=LABELS,
    )


def deformable_detr() -> nn.Module:
    """The model of [`deformable_detr_config`]."""
    from transformers import DeformableDetrForObjectDetection

    return DeformableDetrForObjectDetection(deformable_detr_config()).eval()


def rt_detr_v2() -> nn.Module:
    """RT-DETRv2 with its ResNet-50."""
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    return RTDetrV2ForObjectDetection(RTDetrV2Config(num_labels=LABELS)).eval()


def mask2former() -> nn.Module:
    """Mask2Former with ResNet-50."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=LABELS)).eval()


def grounding_dino() -> nn.Module:
    """GroundingDINO of the tiny class: Swin-T and a BERT."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    swin = SwinConfig(
        window_size=7,
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        out_indices=[2, 3, 4],
        image_size=224,
    )
    return GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=swin)).eval()


def blip_vqa() -> nn.Module:
    """BLIP that answers questions, of the base size: ViT-B/16 at 512 pixels, a BERT-like encoder and decoder."""
    from transformers import BlipConfig, BlipForQuestionAnswering

    config = BlipConfig(vision_config={"image_size": 512}, image_text_hidden_size=256)
    return BlipForQuestionAnswering(config).eval()


def detectors() -> dict[str, Callable[[tuple[int, int]], Callable[[], object]]]:
    """By name, from an image size to a function that runs the model on one image of it, padded where it has to be."""

    def plain(build: Callable[[], nn.Module], multiple: int = 1, **inputs) -> Callable:
        def of_size(size: tuple[int, int]) -> Callable[[], object]:
            padded = [-(-side // multiple) * multiple for side in size]
            model, image = build(), torch.randn(1, 3, *padded)
            return lambda: model(image, **inputs)

        return of_size

    prompt = torch.tensor([[101, 2668, 3526, 1012, 102]])
    return {
        "UniHema base": plain(prepared_unihema),
        "UniHema tiny": plain(lambda: prepared_unihema(preset="tiny")),
        "DeformableDetr two-stage R50": plain(deformable_detr),
        "RT-DETRv2 R50": plain(rt_detr_v2, multiple=32),
        "Mask2Former R50": plain(mask2former),
        "GroundingDINO Swin-T": plain(grounding_dino, input_ids=prompt),
    }


def cells(number: int, images: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Labels of images with so many cells each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(0, LABELS, (number,), generator=generator),
            "boxes": torch.rand(number, 4, generator=generator) * torch.tensor([1, 1, 0.1, 0.1])
            + torch.tensor([0, 0, 0.02, 0.02]),
        }
        for _ in range(images)
    ]


if __name__ == "__main__":
    # One model on one image, in a process of its own: NAME HEIGHT WIDTH.
    name, height, width = sys.argv[1:]
    with torch.no_grad():
        detectors()[name]((int(height), int(width)))()
    say_peak()

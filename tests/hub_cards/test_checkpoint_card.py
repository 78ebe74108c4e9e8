"""The card beside a checkpoint says what it does and what was measured, and no more."""

from huggingface_hub import ModelCard
from tiny_models import very_tiny_config

from unihema.hub_cards import checkpoint_card


REPORT = {
    "detection": {
        "mAP50": 0.7123,
        "per_class": {"platelet": {"AP50": 0.9}},
        "morphology": {"macro_f1": 0.55, "per_attribute": {"vacuoles": {"accuracy": 0.1}}},
        "rows": 19,
    }
}


def test_it_lists_the_trained_tasks_and_the_figures_of_whole_tasks():
    card = checkpoint_card(very_tiny_config(trained={"tasks": ["detection"]}), REPORT)
    assert "| detection | 19 | mAP50 0.712, morphology macro_f1 0.550 |" in card
    assert "0.9" not in card and "0.1" not in card
    assert "- `detection`" in card and "- `segmentation`" not in card and "Single-cell classes" not in card
    assert "red blood cell, platelet, neutrophil" in card and "- vacuoles: absent, prominent" in card
    assert ModelCard(card).data.library_name == "transformers"


def test_it_does_not_claim_what_was_not_measured():
    card = checkpoint_card(very_tiny_config())
    assert "Nothing was measured on validation data." in card and "## Measured" not in card
    assert "- `cloze`" in card

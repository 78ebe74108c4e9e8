"""`unihema card` and `unihema push --dry-run`: from a training run to what would be published."""

import json

from command import run_command
from huggingface_hub import ModelCard
from tiny_checkpoint import save_tiny_checkpoint

from unihema.training.data.synthetic.folder import write_synthetic


def test_from_data_with_a_card_to_a_model_with_a_card(tmp_path):
    write_synthetic(
        tmp_path / "data", 2, 2, seed=0, crops_per_field=2, width=224, height=168, crop_size=96, progress=False
    )
    about = ("--data-source", "https://example.org/smears", "--description", "Painted smears, labelled by the painter.")
    written = run_command("card", "data", "--license", "cc0-1.0", *about, cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    trained = run_command(
        "train", "data", "-o", "run", "-t", "single_cell", "--max-steps", 2, "--image-size", "single_cell=32",
        "--batch-size", "single_cell=2", "--set", "data.workers=0", cwd=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert record["sources"] == [
        {"name": "data", "licence": "cc0-1.0", "source": None, "images": {"train": 4, "val": 4}}
    ]
    # What training cannot know is not in its card, and such a card is not pushed.
    assert ModelCard.load(tmp_path / "run" / "README.md").data.license is None
    refused = run_command("push", "run", "lab/smears", "--dry-run", cwd=tmp_path)
    assert refused.returncode == 2 and "no `license` in its metadata" in refused.stderr
    assert run_command("card", "run", cwd=tmp_path).stderr.startswith(
        "unihema: The licence of the weights is not known"
    )
    named = run_command(
        "card", "run", "--license", "apache-2.0", "--data-source", "data=https://example.org/smears", cwd=tmp_path
    )
    assert named.returncode == 0, named.stderr
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.eval_results[0].dataset_name == "data"
    assert "| data | cc0-1.0 | 4 train, 4 val | https://example.org/smears |" in card.text
    listed = run_command("push", "run", "lab/smears", "--dry-run", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "data.json" in listed.stdout and "checkpoints (training checkpoints" in listed.stdout


def test_a_card_written_by_hand_is_not_lost(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    (folder / "README.md").write_text("# Mine\n")
    arguments = ("card", folder, "--license", "mit", "--data-license", "smears=mit")
    refused = run_command(*arguments)
    assert refused.returncode == 2 and "somebody wrote this file by hand" in refused.stderr
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert run_command(*arguments, "--overwrite").returncode == 0
    assert run_command(*arguments, "--name", "Other").returncode == 0
    assert "\n# Other\n" in (folder / "README.md").read_text()
    wrong = run_command("card", folder, "--license", "mit", "--data-license", "mit")
    assert wrong.returncode == 2 and "such as cbc=mit" in wrong.stderr

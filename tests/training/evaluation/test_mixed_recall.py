"""Red cells of one set beside a set that does not box them."""

from dataclasses import replace

import pytest

from unihema.training.evaluation import evaluate_model
from unihema.training.run.build import validation_rows
from unihema.training.run.config import DataConfig, LoggingConfig, OptimisationConfig, RunConfig
from unihema.training.run.loop import train


# Two short runs differ by some hundredths for no reason.
TOLERANCE = 0.05
STEPS = 160


def red_cells_found(tmp_path, data_dir, steps: int, *folders: str, **options) -> tuple[float, float]:
    """Of the red cells of cbc's val split: the share found above the threshold of best F1, and AP50."""
    from unihema import UniHemaForMultiTask, UniHemaProcessor

    config = RunConfig(
        output_dir=str(tmp_path / "-".join(folders)),
        data=DataConfig(
            folders=[str(data_dir / folder) for folder in folders],
            val_split="",
            tasks=["detection"],
            image_sizes={"detection": {"longest_edge": 192}},
            batch_size={"detection": 4},
            workers=0,
            **options,
        ),
        optimisation=OptimisationConfig(max_steps=steps, learning_rate=4e-4, warmup_steps=20),
        logging=LoggingConfig(progress=False),
    )
    train(config)
    model = UniHemaForMultiTask.from_pretrained(config.output_dir)
    processor = UniHemaProcessor.from_pretrained(config.output_dir)
    measured = replace(config, data=replace(config.data, folders=[str(data_dir / "cbc")], val_split="val"))
    rows = validation_rows(measured, ["detection"])
    report = evaluate_model(model, processor, rows, calibrate=True, bootstrap=0, progress=False)
    figures = report["detection"]
    return figures["at_threshold"]["RBC"]["recall"], figures["per_class"]["RBC"]["AP50"]


@pytest.mark.slow
def test_a_set_without_red_cells_does_not_lower_their_recall(tmp_path, data_dir):
    alone = red_cells_found(tmp_path, data_dir, STEPS, "cbc")
    # As many fields of cbc as before, and as many of wbc5 between them.
    mixed = red_cells_found(tmp_path, data_dir, 2 * STEPS, "cbc", "wbc5", dataset_temperature=0.0)
    assert min(alone) > 0.3, "without having learned anything there is nothing to lower"
    assert mixed[0] > alone[0] - TOLERANCE
    assert mixed[1] > alone[1] - TOLERANCE

"""Training runs of a few steps that tests share."""

from tiny_models import VERY_TINY

from unihema.training.run.config import DataConfig, LoggingConfig, ModelConfig, OptimisationConfig, RunConfig


TASKS = ("detection", "segmentation", "single_cell", "question_answering", "cloze")


def run_config(smears, output, **changes) -> RunConfig:
    """A run of a few steps on all five tasks."""
    text = {**VERY_TINY["text_config"], "dropout_rate": 0.1}
    config = RunConfig(
        output_dir=str(output),
        data=DataConfig(
            folders=[str(smears)],
            image_sizes={task: {"longest_edge": 64} for task in TASKS},
            batch_size=dict.fromkeys(TASKS, 2),
            questions_per_image=2,
            workers=0,
        ),
        model=ModelConfig(overrides={**VERY_TINY, "text_config": text, "fusion_queries": 64}),
        optimisation=OptimisationConfig(max_steps=6, ema_decay=0.9, warmup_steps=2, learning_rate=1e-3),
        logging=LoggingConfig(progress=False, log_every=1, checkpoint_minutes=None),
    )
    return config.with_overrides(changes)

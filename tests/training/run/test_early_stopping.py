"""When a run stops by itself."""

from unihema.training.run.checkpoint import Progress
from unihema.training.run.early_stopping import EarlyStopping


def test_early_stopping_counts_evaluations_and_takes_no_nan():
    stopping, progress = EarlyStopping(2), Progress()
    taken = []
    for step, score in enumerate((0.1, float("nan"), 0.3, 0.3), 1):
        progress.step = step
        taken.append(stopping.take(score, progress))
    assert taken == [True, False, True, False]
    assert (progress.best, progress.best_step, progress.waited) == (0.3, 3, 1) and not stopping.is_over(progress)
    assert not stopping.take(0.2, progress) and stopping.is_over(progress)
    assert not EarlyStopping(None).is_over(progress)

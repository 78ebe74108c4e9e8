"""Where a model breaks: the same evaluation on corrupted images, severity by severity."""

from unihema.training.stress.corruptions import CORRUPTIONS, LEVELS, Corruption
from unihema.training.stress.shifted_rows import shifted_rows
from unihema.training.stress.suite import STRESS_FILE, STRESS_TASKS, run_stress


__all__ = ["CORRUPTIONS", "LEVELS", "STRESS_FILE", "STRESS_TASKS", "Corruption", "run_stress", "shifted_rows"]

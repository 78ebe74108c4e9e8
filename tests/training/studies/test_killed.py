"""Studies that are killed at random moments and started again end, to the bit, as if they had not been."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import killed_and_resumed, undisturbed, weights
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import run_config

from unihema.training.data.synthetic.cells import CLASSES
from unihema.training.run.build import build, load_rows, training_rows
from unihema.training.studies.ablations import run_ablations
from unihema.training.studies.adapt import adapt
from unihema.training.studies.stages import SIX_STAGES, train_stages
from unihema.training.studies.stress import run_stress


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is copied")
SHORT = {"optimisation.max_steps": 2, "logging.checkpoint_steps": 1, "optimisation.device": "cpu"}


@pytest.fixture(scope="module")
def studies(smears, tmp_path_factory) -> dict[str, Callable[[Path], Any]]:
    """Each of the studies, small, from a folder to what it says; it goes on with what is in the folder."""
    root = tmp_path_factory.mktemp("studies")
    base = save_tiny_checkpoint(
        root / "base", num_queries=12, id2label=dict(enumerate(CLASSES)), trained_tasks=["detection"]
    )
    torch.manual_seed(0)
    config = run_config(smears, root / "untrained")
    model, processor = build(config, training_rows(config))
    rows = load_rows(config.data, "val", ["single_cell"])
    two_stages = tuple(stage for stage in SIX_STAGES if stage.name in ("single_cell", "segmentation"))
    small = {"data.image_sizes": {"single_cell": {"longest_edge": 32}}, "data.batch_size": {"single_cell": 2}}
    small |= {"logging.progress": False, "logging.evaluate_every": 1, "optimisation.warmup_steps": 1}

    def stages(folder: Path) -> Any:
        return train_stages(run_config(smears, folder, **SHORT), two_stages, resume=True)

    def ablations(folder: Path) -> Any:
        changes = {**SHORT, "data.tasks": ["segmentation"]}
        return run_ablations(run_config(smears, folder, **changes), ["bilinear_upsampler"], resume=True)

    def adapting(folder: Path) -> Any:
        return adapt(base, smears, "classification", folder, folds=2, overrides=SHORT | small, resume=True)

    def stress(folder: Path) -> Any:
        return run_stress(
            model.eval(),
            processor,
            rows,
            folder,
            ["jpeg", "noise"],
            bootstrap=20,
            settings={"of": "test"},
            progress=False,
        )

    return {"stages": stages, "ablations": ablations, "adapt": adapting, "stress": stress}


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["stages", "ablations", "adapt", "stress"])
def test_a_killed_study_changes_no_figure(studies, tmp_path, name, kills):
    study = studies[name]
    whole = undisturbed(lambda: study(tmp_path / "whole"))
    written = pages(tmp_path / "whole")
    for folder, found in killed_and_resumed(study, tmp_path, kills, whole):
        assert found == whole.result
        assert weights(folder) == weights(tmp_path / "whole")
        assert pages(folder) == written


def pages(folder: Path) -> dict[str, str]:
    """The tables of a study, and of its runs. Cards have the names of folders."""
    files = [path for path in folder.rglob("*.md") if path.name != "README.md"]
    return {str(path.relative_to(folder)): path.read_text() for path in files}

"""`unihema ablate`: its options become settings of every run, and it prints the table."""

import pytest
from click.testing import CliRunner

from unihema.errors import TrainingInterrupted
from unihema.training.studies import ablate as runner
from unihema_cli import app


@pytest.fixture
def calls(monkeypatch) -> list:
    """What the command asks for; nothing is trained."""
    made = []

    def run_ablations(config, names, unseen, resume):
        made.append((config, names, unseen, resume))
        if resume:
            raise TrainingInterrupted("Stopped at step 3")
        (runner.Path(config.output_dir)).mkdir()
        (runner.Path(config.output_dir) / "ablation.md").write_text("| the table |")

    monkeypatch.setattr(runner, "run_ablations", run_ablations)
    return made


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["ablate", *map(str, arguments)])


def test_options_are_settings_of_every_run(calls, tmp_path):
    mix = tmp_path / "mix.yaml"
    mix.write_text("data: {folders: [one, two], tasks: [cloze]}\noptimisation: {learning_rate: 0.5, epochs: 3.0}\n")
    result = invoke(
        "--data", mix, "-o", tmp_path / "out", "--only", "no_fusion", "--only", "unseen", "--unseen", "two",
        "--max-steps", 7, "--set", "optimisation.seed=4",
    )  # fmt: skip
    assert result.exit_code == 0 and "| the table |" in result.output
    ((config, names, unseen, resume),) = calls
    assert (names, unseen, resume) == (["no_fusion", "unseen"], "two", False)
    assert config.data.folders == [str(tmp_path / "one"), str(tmp_path / "two")] and config.data.tasks == ["cloze"]
    assert (config.optimisation.max_steps, config.optimisation.seed, config.optimisation.learning_rate) == (7, 4, 0.5)


def test_folders_alone_ask_every_question(calls, tmp_path):
    assert invoke(tmp_path / "one", "-o", tmp_path / "out", "-t", "detection").exit_code == 0
    config, names, unseen, _ = calls[0]
    assert (names, unseen, config.data.tasks) == (None, None, ["detection"])
    assert config.data.folders == [str(tmp_path / "one")]


def test_a_stopped_run_has_exit_code_three(calls, tmp_path):
    result = invoke(tmp_path, "-o", tmp_path / "out", "--resume")
    assert result.exit_code == 3 and "Stopped at step 3" in result.output


def test_two_sources_of_settings_are_refused(tmp_path):
    result = invoke("--data", tmp_path / "a.yaml", "--config", tmp_path / "b.json", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "give one of them" in " ".join(result.output.split())

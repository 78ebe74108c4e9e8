"""The tool that averages checkpoints."""

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint

from tools.mean_of_weights import main
from unihema.loading import load_model


def test_the_mean_is_a_checkpoint_and_its_weights_lie_half_way(tmp_path):
    first = save_tiny_checkpoint(tmp_path / "first")
    second = save_tiny_checkpoint(tmp_path / "second")
    changed = load_file(second / "model.safetensors")
    save_file({name: value + 1 if value.is_floating_point() else value for name, value in changed.items()},
              second / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    (first / "log.jsonl").write_text("{}")
    done = CliRunner().invoke(main, [str(first), str(second), str(tmp_path / "mean")])
    assert done.exit_code == 0, done.output
    one, two, mean = (load_file(folder / "model.safetensors") for folder in (first, second, tmp_path / "mean"))
    assert mean.keys() == one.keys()
    for name, value in mean.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2 if value.is_floating_point() else one[name])
    assert (
        load_model(tmp_path / "mean", device="cpu")[0].config.id2label
        and not (tmp_path / "mean" / "log.jsonl").exists()
    )


def test_other_weights_are_refused_and_nothing_is_written(tmp_path):
    first = save_tiny_checkpoint(tmp_path / "first")
    second = save_tiny_checkpoint(tmp_path / "second", num_queries=13)
    done = CliRunner().invoke(main, [str(first), str(second), str(tmp_path / "mean")])
    assert done.exit_code != 0 and "have not the same weights" in str(done.exception)
    assert not (tmp_path / "mean").exists()
    assert CliRunner().invoke(main, [str(first), str(tmp_path / "mean")]).exit_code == 2
    assert CliRunner().invoke(main, [str(first), str(second), str(first)]).exit_code == 2

"""A mix of data sets and how to train on it, as a YAML file that people write (`unihema train --config MIX.yaml`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unihema.errors import RunConfigError
from unihema.training.files import write_json
from unihema.training.run.config import RunConfig, provenance


# A run in stages leaves its mix under this name, so that it can be resumed and repeated; JSON is YAML too.
MIX_FILE = "mix.json"


@dataclass
class Mix:
    """What the file says.

    Args:
        run ([`RunConfig`]): Settings under the names of `run_config.json`; `data.folders` are relative to the file.
        stages (`dict[str, dict[str, Any]]`): Stage -> settings that differ there, by dotted name.
    """

    run: RunConfig
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Writes `mix.json`, which [`read_mix`] reads."""
        self.run.provenance = provenance()
        write_json(Path(folder) / MIX_FILE, {**self.run.to_dict(), "stages": self.stages})


def read_mix(path: str | Path) -> Mix:
    """Reads a mix.

    Example of a file:

    ```yaml
    data:
      folders: [cbc, wbc5, pbc]
      image_sizes: {detection: {longest_edge: 320}}
    optimisation: {learning_rate: 4.0e-4}
    stages:
      joint_visual: {optimisation.time_limit_minutes: 45}
    ```

    Raises:
        RunConfigError: No such file, broken YAML, an unknown setting or a value of the wrong type.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunConfigError(f"{path}: no such file. It should list data folders, see docs/training.md.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunConfigError(f"{path}: broken YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict):
        raise RunConfigError(f"{path}: a mix is a set of settings (data: ..., stages: ...), got {values!r}.")
    stages = values.pop("stages", None) or {}
    if not isinstance(stages, dict) or not all(isinstance(changes, dict) for changes in stages.values()):
        raise RunConfigError(f"{path}: 'stages' must be stage names, each with its settings.")
    run = RunConfig.from_dict(values, str(path))
    run.data.folders = [str((path.parent / Path(folder).expanduser()).resolve()) for folder in run.data.folders]
    return Mix(run, {str(name): dict(changes) for name, changes in stages.items()})


__all__ = ["MIX_FILE", "Mix", "read_mix"]

"""Data that training tests share."""

import pytest

from unihema.training.data.synthetic.folder import write_synthetic


@pytest.fixture(scope="session")
def smears(tmp_path_factory):
    """A folder of synthetic smears for all five tasks: four fields to train on, two to measure on."""
    folder = tmp_path_factory.mktemp("smears")
    return write_synthetic(folder, 4, 2, seed=0, crops_per_field=2, width=224, height=168, crop_size=96, progress=False)

"""What most tests of the analyzer analyse with."""

import pytest
from tiny_checkpoint import save_tiny_checkpoint

from unihema import Analyzer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint; modules that need another one have their own fixture of this name."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "unihema")


@pytest.fixture(scope="module")
def analyzer(checkpoint):
    """Shared by tests that change nothing."""
    return Analyzer.from_pretrained(checkpoint, device="cpu")

"""What every test runs under: no network, few threads, seeds."""

import logging
import os


# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait spinning make the tests several times slower on a machine that has other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_socket import socket_allow_hosts


pytest.register_assert_rewrite("head_behaviour")


def pytest_configure(config):
    # Small models are fastest on one thread, most of all beside other work; the trainings of the slow tests are not.
    if config.option.markexpr != "slow":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network():
    """Only this machine can be reached."""
    socket_allow_hosts(["127.0.0.1", "::1"], allow_unix_socket=True)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def loading_log(caplog):
    """What loading says, which is where Transformers tells of missing and mismatched weights."""
    logger = logging.getLogger("transformers")
    propagates, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.INFO, logger="transformers"):
        yield caplog
    logger.propagate = propagates


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: `UNIHEMA_DATA`, or `shared/data` beside the repository."""
    return _folder("UNIHEMA_DATA", "data", "real data")


@pytest.fixture(scope="session")
def official_dir() -> Path:
    """What was recorded of the official model: `UNIHEMA_OFFICIAL`, or `shared/official` beside the repository."""
    return _folder("UNIHEMA_OFFICIAL", "official", "recorded official outputs")


def _folder(variable: str, name: str, what: str) -> Path:
    folder = Path(os.environ.get(variable) or Path(__file__).parents[2] / "shared" / name)
    if not folder.is_dir():
        pytest.skip(f"no {what} in {folder}; set {variable}")
    return folder

import pytest
from both_backends import BACKENDS, SIZES

from unihema import UniHemaProcessor


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def image_processor(backend):
    return BACKENDS[backend](task_sizes=SIZES)


@pytest.fixture
def processor(image_processor):
    return UniHemaProcessor(image_processor, UniHemaProcessor.from_default().tokenizer)

"""The load test of the server, for a moment, with a tiny checkpoint."""

import sys

import pytest
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint


pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

from benchmarks import serve


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of the server is read from /proc")
@pytest.mark.filterwarnings("ignore::unihema.analyzer.QueryCapWarning")
def test_no_good_request_fails_among_bad_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "BAD", 0.4)
    Image.linear_gradient("L").resize((64, 48)).save(tmp_path / "field.png")
    checkpoint = save_tiny_checkpoint(tmp_path / "unihema", num_queries=8)
    found = serve.measure(checkpoint, [tmp_path / "field.png"], clients=4, minutes=0.05, rounds=1)
    assert found["images"] == 3 and found["good requests"] and not found["failed good requests"], found["why"]
    statuses = {
        "no image": "422",
        "half an image": "422",
        "a bomb": "422",
        "no form": "415",
        "another field": "422",
        "half an upload": "broken off",
    }
    for case in found["bad requests"]:
        kind, _, status = case.partition(": ")
        # Who sends two gigabytes may still be sending when the connection is closed.
        assert status == statuses.get(kind, status) and (kind in statuses or status in ("413", "connection closed"))
    assert found["bad requests"] and found["MB at the end"] > 0
    text = serve.page(found)
    assert (
        f"{found['good requests']}, of which 0 failed" in text and "by processor seconds (medians of 1 rounds" in text
    )

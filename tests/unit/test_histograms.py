"""The histograms of /metrics: as prometheus_client's own tell them, and summed over processes."""

from __future__ import annotations

from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from datapipe.monitor.metrics import Histogram, Metrics

BOUNDS = (0.0005, 0.001, 0.0125, 1, 30)
STATUS: dict[str, Any] = {
    "version": "1.0", "lanes": {}, "dead_letters": None, "totals": {"waiting_bytes": 0},
    "rejected": {}, "keys": {},
    "mirror": {"calls": {}, "up": True, "bytes": 0, "max_bytes": 1, "used": 0.0, "fullest": None},
    "database": {"up": True},
}  # fmt: skip


@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 100))))
def test_samples_are_those_of_prometheus_client(observed: list[float]) -> None:
    ours = Histogram("seconds", "", BOUNDS)
    theirs = prometheus_client.Histogram("seconds", "", buckets=BOUNDS, registry=None)
    for seconds in observed:
        ours.observe(seconds)
        theirs.observe(seconds)
    (family,) = theirs.collect()
    assert ours.samples() == {
        sample.labels.get("le", "sum"): pytest.approx(sample.value)
        for sample in family.samples
        if sample.name.endswith(("_bucket", "_sum"))
    }


def test_those_of_several_processes_are_summed() -> None:
    here, there = Metrics(), Metrics()
    of_release_1 = here.histograms()
    del of_release_1["datapipe_request_seconds"]
    for seconds in (0.0004, 0.0041, 60):
        here.request_seconds.observe(seconds)
    there.request_seconds.observe(0.005)
    there.load_seconds.observe(2)
    text = here.text(STATUS, [here.histograms(), of_release_1, there.histograms()]).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    found = {
        sample.labels.get("le", sample.name.rpartition("_")[2]): sample.value
        for sample in families["datapipe_request_seconds"].samples
    }
    assert (found["0.0005"], found["0.004"], found["0.005"]) == (1, 1, 3)
    assert (found["30.0"], found["+Inf"], found["count"]) == (3, 4, 4)
    assert found["sum"] == pytest.approx(60.0095)
    loads = {sample.name: sample.value for sample in families["datapipe_load_seconds"].samples}
    assert loads["datapipe_load_seconds_count"] == 1

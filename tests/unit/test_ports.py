"""Ports of tests: each is given once, and to one worker alone."""

from __future__ import annotations

import socket
from itertools import islice

import pytest

from tests import ports


def test_ports_differ() -> None:
    assert len(set(ports.free_ports("127.0.0.1", 50))) == 50


def test_one_that_somebody_has_is_passed_over() -> None:
    taken = ports.free_port() + 1
    with socket.create_server(("127.0.0.1", taken)):
        assert ports.free_port() != taken


def test_no_two_workers_have_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for worker in range(5):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{worker}")
        shares.append(set(islice(ports._mine.__wrapped__(), 4000)))
    assert len(set.union(*shares)) == sum(map(len, shares)) == 5 * 2000
    assert max(set.union(*shares)) < 32_768

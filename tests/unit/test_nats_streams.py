"""What is known of a lane's stream between two looks."""

from __future__ import annotations

import pytest

from datapipe.mirrors.nats.streams import Stream

MIB = 1 << 20


@pytest.mark.parametrize(
    ("max_bytes", "stored", "full"),
    [
        (64 * MIB, 62 * MIB, False),
        (64 * MIB, 63 * MIB + 1, True),
        (MIB, MIB - 65_536, False),
        (MIB, MIB - 65_535, True),
        (0, 1000, False),  # its name is known, and nothing else
        (-1, 64 * MIB, False),  # made without a limit
    ],
)
def test_full(max_bytes: int, stored: int, full: bool) -> None:
    stream = Stream("install", "datapipe_install")
    stream.there, stream.max_bytes = True, max_bytes
    stream.entered(1, stored)
    assert (stream.full is not None) == full

"""A segment as a message, and back; what is not one is told apart."""

from __future__ import annotations

import pytest

from datapipe.events.segment import Part, Segment
from datapipe.events.types import Column
from datapipe.mirrors.nats import wire

SEGMENT = Segment(
    "install",
    (Column("n", "bigint"),),
    b"1\n2\n",
    2,
    (Part("c", "b", 0, 0, 2, 1),),
    created_at=1.5,
    neutral=True,
)


def test_there_and_back() -> None:
    headers = wire.headers_of("t", SEGMENT)
    subject = wire.subject_of("t", "install", 2)
    found = wire.decode("t", subject, headers, wire.encode(SEGMENT), 7)
    names = ("id", "lane", "data", "events", "columns", "parts", "created_at", "neutral")
    assert [getattr(found, name) for name in names] == [getattr(SEGMENT, name) for name in names]
    assert (found.source, found.position) == ("nats", 7)
    assert headers == {"Nats-Msg-Id": SEGMENT.id, "Nats-Expected-Stream": "t_install"}


@pytest.mark.parametrize(
    ("subject", "headers", "payload"),
    [
        ("t.install.many", {"Nats-Msg-Id": "a"}, wire.encode(SEGMENT)),
        ("t.install", {"Nats-Msg-Id": "a"}, wire.encode(SEGMENT)),
        ("t.install.2.3", {"Nats-Msg-Id": "a"}, wire.encode(SEGMENT)),
        ("t.install.2", None, wire.encode(SEGMENT)),
        ("t.install.2", {}, wire.encode(SEGMENT)),
        ("t.install.2", {"Nats-Msg-Id": "a"}, b""),
        ("t.install.2", {"Nats-Msg-Id": "a"}, b"{}"),
        ("t.install.2", {"Nats-Msg-Id": "a"}, b"now []\n1\n2\n"),
        ("t.install.2", {"Nats-Msg-Id": "a"}, b"1.5 [2,[],[],true]\n1\n2\n"),
        ("t.install.2", {"Nats-Msg-Id": "a"}, b"1.5 \xff\n1\n2\n"),
    ],
)
def test_what_is_not_ours_is_unreadable(
    subject: str, headers: dict[str, str] | None, payload: bytes
) -> None:
    with pytest.raises(wire.Unreadable):
        wire.decode("t", subject, headers, payload, 1)

"""How many replicas are tried next, when JetStream refuses to make a stream."""

from __future__ import annotations

import pytest

from datapipe.mirrors.nats.client import ApiError, Client
from datapipe.mirrors.nats.streams import Streams
from datapipe.settings import Settings

ALONE = ApiError(10074, "NATS: replicas > 1 not supported in non-clustered mode (10074)")
TOO_FEW = ApiError(10005, "NATS: no suitable peers for placement (10005)")
AWAY = ApiError(10005, "NATS: no suitable peers for placement, peer offline (10005)")
NO_ROOM = ApiError(10005, "NATS: no suitable peers for placement, insufficient storage (10005)")


@pytest.mark.parametrize(
    ("refusal", "replicas", "setting", "wanted"),
    [
        (ALONE, 3, 0, 1),
        (TOO_FEW, 3, 0, 2),
        (TOO_FEW, 2, 0, 1),
        (TOO_FEW, 1, 0, None),
        (AWAY, 3, 0, None),  # it is still one of the nodes
        (NO_ROOM, 3, 0, None),
        (TOO_FEW, 3, 3, None),  # as the setting says, or not at all
        (ALONE, 3, 3, None),
    ],
)
def test_fewer_only_where_there_are_no_more_nodes(
    refusal: ApiError, replicas: int, setting: int, wanted: int | None
) -> None:
    settings = Settings(mirror="nats", nats_url="nats://127.0.0.1:1", nats_replicas=setting)
    assert Streams(Client(settings), settings)._fewer(refusal, replicas) == wanted

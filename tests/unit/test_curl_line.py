"""The `curl` line of `make run`."""

from __future__ import annotations

import json
import shlex

from datapipe.cli.serve import curl_line
from datapipe.events.registry import load_registry
from datapipe.settings import Settings

ADDRESS = "http://127.0.0.1:8080"


def test_it_posts_an_event_and_has_a_place_for_the_key() -> None:
    kind = load_registry(Settings(events={"note": {"it": 'str = "it\'s"'}})).types["note"]
    curl, data, event, url = shlex.split(curl_line(kind, ADDRESS, key=False))
    assert (curl, data, url) == ("curl", "-d", f"{ADDRESS}/")
    assert json.loads(event)["event_name"] == "note"
    with_key = shlex.split(curl_line(kind, ADDRESS, key=True))
    assert with_key == [curl, "-H", "Authorization: Bearer KEY", data, event, url]

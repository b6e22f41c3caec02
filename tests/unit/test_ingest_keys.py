"""Ingest keys: who is who, what a rate lets through, what entries may not contradict."""

from __future__ import annotations

from typing import Any

import pytest

from datapipe import settings
from datapipe.errors import ConfigError, EventRejected, RateLimited
from datapipe.http import ingest_keys
from datapipe.http.auth import Credentials
from datapipe.http.ingest_keys import ANYBODY, Bucket, Grant, IngestKeys, check_lanes
from datapipe.pipeline.records import Records
from datapipe.settings import IngestKey, Settings

TYPES = ("install", "purchase")


def named(name: str = "ios", key: str = "k", **more: Any) -> IngestKey:
    return IngestKey(name=name, key=key, **more)


def compiled(*entries: str | IngestKey) -> IngestKeys:
    return IngestKeys(entries, Records(), TYPES)


def grant(keys: IngestKeys, key: str, in_query: str | None = None) -> Grant:
    return keys.grant(Credentials(f"Bearer {key}", in_query))


class Clock:
    """Seconds, at will."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ingest_keys, "monotonic", clock)
    return clock


# --- the rate ---


def filled(rate: float) -> Bucket:
    bucket = Bucket("ios")
    bucket.set_rate(rate)
    return bucket


def taken_at_once(bucket: Bucket, most: int = 100_000) -> int:
    """How many single events are let through at this moment."""
    for count in range(most):
        try:
            bucket.take(1)
        except RateLimited:
            return count
    return most


@pytest.mark.parametrize("rate", [0.5, 3.0, 500.0])
def test_at_once_ten_seconds_of_the_rate_and_then_the_rate(clock: Clock, rate: float) -> None:
    bucket = filled(rate)
    assert taken_at_once(bucket) == pytest.approx(10 * rate, abs=1.001)
    clock.now += 20 / rate
    assert taken_at_once(bucket) == pytest.approx(min(20, 10 * rate), abs=1.001)
    clock.now += 1e6  # what is not used in 10 s is lost
    assert taken_at_once(bucket) == pytest.approx(10 * rate, abs=1.001)


def test_one_batch_may_overdraw_and_the_error_says_for_how_long(clock: Clock) -> None:
    bucket = filled(500)
    bucket.take(20_000)
    with pytest.raises(RateLimited, match=r"'ios'.*500 events a second") as caught:
        bucket.take(1)
    assert caught.value.retry_after_s == pytest.approx(30)
    clock.now += 29.9
    with pytest.raises(RateLimited):
        bucket.take(0)
    clock.now += 0.2
    bucket.take(0)


def test_what_is_given_back_can_be_taken_again(clock: Clock) -> None:
    bucket = filled(1)
    bucket.take(60)
    bucket.give_back(60)
    assert taken_at_once(bucket) == pytest.approx(10, abs=1.001)


def test_another_rate_counts_at_once_whatever_was_taken_at_the_one_before(clock: Clock) -> None:
    bucket = filled(1.0)
    bucket.take(20_000)
    bucket.set_rate(1.0)
    with pytest.raises(RateLimited):
        bucket.take(1)
    bucket.set_rate(100.0)
    assert taken_at_once(bucket) == pytest.approx(1000, abs=1.001)


def test_without_a_rate_all_is_let_through(clock: Clock) -> None:
    assert taken_at_once(filled(0)) == 100_000


def test_the_least_rate_there_is_can_be_answered(clock: Clock) -> None:
    bucket = filled(5e-324)
    bucket.take(1)
    with pytest.raises(RateLimited) as caught:
        bucket.take(1)
    assert caught.value.retry_after_s <= 1e9


# --- who ---


def test_without_keys_anybody_may_post() -> None:
    assert compiled().grant(Credentials(None)) is ANYBODY


def test_what_is_remembered_is_no_other_key() -> None:
    """Header and query count together, and only what was granted is remembered."""
    keys = compiled("one", named(key="two"))
    for _ in range(3):
        assert grant(keys, "one").lanes is None
        assert grant(keys, "two", "one").use is grant(keys, "two").use
        assert keys.grant(Credentials(None, "one")).lanes is None
        assert keys.grant(Credentials("Digest one", "two")).use is grant(keys, "two").use
        for given in (("Digest two", None), (None, None), (None, "three"), ("Bearer three", "one")):
            with pytest.raises(EventRejected):
                keys.grant(Credentials(*given))
    assert len(keys._remembered) == 5


def test_what_is_remembered_is_bounded() -> None:
    keys = compiled("k")
    for i in range(3000):
        keys.grant(Credentials(f"Digest {i}", "k"))
        keys.grant(Credentials(f"Digest {i}{'x' * 8000}", "k"))
    assert len(keys._remembered) <= 1024
    assert max(len(given.authorization or "") for given in keys._remembered) <= 512


def test_a_reload_counts_from_the_next_post_on() -> None:
    keys = compiled("old", named("ios", "a"))
    before = grant(keys, "a")
    grant(keys, "old")
    keys.reload([named("ios", "b", lanes=["install"], rate=1)])
    for gone in ("old", "a"):
        with pytest.raises(EventRejected):
            grant(keys, gone)
    after = grant(keys, "b")
    assert after.lanes == {"install"}
    # counters and bucket go on, and idempotency keys stand
    assert (after.use, after.bucket, after.scope) == (before.use, before.bucket, before.scope)
    keys.reload([])
    assert grant(keys, "whatever") is ANYBODY


def test_a_reload_that_is_refused_changes_nothing() -> None:
    keys = compiled("k")
    with pytest.raises(ConfigError):
        keys.reload([named(lanes=["instal"])])
    assert grant(keys, "k").lanes is None


def test_names_share_and_others_do_not() -> None:
    keys = compiled("plain", "other", named("ios", "a"), named("ios", "b"), named("plain", "c"))
    ios, again = grant(keys, "a"), grant(keys, "b")
    assert (ios.use, ios.bucket, ios.scope) == (again.use, again.bucket, again.scope)
    grants = [grant(keys, key) for key in ("plain", "other", "a", "c")]
    for what in ("use", "bucket", "scope"):  # a name is no key, though it reads the same
        assert len({id(getattr(g, what)) for g in grants}) == 4, what
    assert len({g.scope for g in (*grants, ANYBODY)}) == 5


def test_the_scope_of_a_key_without_a_name_is_that_of_release_1_0() -> None:
    """Keys that were stored before an upgrade stand."""
    assert grant(compiled("k"), "k").scope == b"61f5dc14830084d8dc2d1ebc02ef3dec"
    assert ANYBODY.scope == b"cae66941d9efbd404e4d88758ea67670"


def test_lanes_of_a_named_key() -> None:
    assert grant(compiled(named()), "k").lanes == set(TYPES)  # no event of an unknown type
    lanes = ["install", "datapipe_unknown"]
    assert grant(compiled(named(lanes=lanes)), "k").lanes == set(lanes)


# --- what is wrong ---


def test_a_lane_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'ios' may post to 'instal'.*'install'"):
        check_lanes([named(lanes=["purchase", "instal"])], TYPES)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([named(rate=1), named(key="SECRET", rate=2)], "'ios' must have the same `lanes`"),
        ([named(), named(key="SECRET", lanes=["install"])], "'ios' must have the same `lanes`"),
        (["SECRET", named(key="SECRET")], "entry 1 is there twice"),
        ([named("a", "SECRET"), named("b", "SECRET")], "entry 1 is there twice"),
    ],
)
def test_entries_that_contradict_each_other(entries: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        settings.check(Settings(ingest_keys=entries), {"ingest_keys": "file x"})
    assert "ingest_keys (from file x)" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_entries_that_do_not() -> None:
    settings.check(Settings(ingest_keys=["a", "a", named("x", "b"), named("x", "c")]))
    lanes = [named("x", "b", lanes=["a", "b"]), named("x", "c", lanes=["b", "a"])]
    settings.check(Settings(ingest_keys=lanes))


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"name": "ios"}, "ingest_keys[0].key"),
        ({"key": "SECRET"}, "ingest_keys[0].name"),
        ({"name": "", "key": "SECRET"}, "ingest_keys[0].name"),
        ({"name": "ios", "key": ""}, "ingest_keys[0].key"),
        ({"name": "ios", "key": "SECRET", "lane": []}, "ingest_keys[0].lane"),
        ({"name": "ios", "key": "SECRET", "lanes": "x"}, "ingest_keys[0].lanes"),
        ({"name": "ios", "key": "SECRET", "rate": -1}, "ingest_keys[0].rate"),
        ({"name": "ios", "key": "SECRET", "rate": "fast"}, "ingest_keys[0].rate"),
    ],
)
def test_an_entry_that_is_none_names_the_place_and_no_key(entry: object, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings.load({"ingest_keys": [entry]}, {})
    assert key in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_no_repr_shows_a_key() -> None:
    entry = named(key="SECRET")
    keys = compiled(entry, "SECRET2")
    shown = [entry, [entry], Settings(ingest_keys=[entry]), keys, grant(keys, "SECRET")]
    assert "SECRET" not in "".join(map(repr, shown))

"""What is wrong with the settings of `mirror: nats`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from datapipe.settings import Settings

# An append must be over long before the ledger forgets a segment: see `mirrors/nats/prune.py`.
NATS_TIMEOUT_S = 300.0
NATS_FILES = ("nats_creds", "nats_nkey_file", "nats_ca_file", "nats_cert_file", "nats_key_file")


def nats_faults(settings: Settings) -> Iterator[tuple[str, str]]:
    """What is wrong with the settings of `mirror: nats`: keys and why, with the remedy."""
    if not settings.nats_url:
        yield "mirror", "'nats' needs nats_url, such as nats://host:4222"
    if settings.mirror_timeout > NATS_TIMEOUT_S:
        yield "mirror_timeout", f"must be at most {NATS_TIMEOUT_S:g} with mirror 'nats'"
    for number, url in enumerate(settings.nats_url.split(","), 1):
        if why := _url_fault(url.strip()):
            login = "; a login with / , ? or # goes into nats_user and nats_password"
            more = login if "@" in settings.nats_url else ""
            yield (
                "nats_url",
                f"{why} (URL number {number}; commas part them){more}",
            )
    if not settings.database_url or settings.database_url.startswith("sqlite:"):
        why = "mirror 'nats' needs a database that all processes share"
        yield "database_url", f"{why}: postgresql://... or mysql://..."
    keys = [key for key in ("nats_creds", "nats_nkey_file", "nats_user") if getattr(settings, key)]
    keys += ["a login in nats_url"] if "@" in settings.nats_url else []
    if len(keys) > 1:
        yield keys[0], f"only one way to log in may be set: leave one of {' and '.join(keys)}"
    for key, other in (
        ("nats_password", "nats_user"),
        ("nats_user", "nats_password"),  # a user alone may be meant for a token
        ("nats_cert_file", "nats_key_file"),
        ("nats_key_file", "nats_cert_file"),
    ):
        if getattr(settings, key) and not getattr(settings, other):
            more = "; a token goes into nats_url: nats://TOKEN@HOST" if key == "nats_user" else ""
            yield key, f"needs {other} as well{more}"
    for key in NATS_FILES:
        try:
            if path := getattr(settings, key):
                Path(path).open("rb").close()
        except (OSError, ValueError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else "this is not a path"
            yield key, f"{path!r} can't be read: {why}"


def _url_fault(url: str) -> str | None:
    """What is wrong with one URL; never shows it, as it may hold a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "must be like nats://host:4222, with a port from 1 to 65535"
    if parts.scheme not in ("nats", "tls") or not parts.hostname:
        return "must be like nats://host:4222 or tls://host:4222"
    if port == 0 or parts.path.strip("/") or parts.query or parts.fragment:
        return "must end with the host or a port from 1 to 65535"
    return None

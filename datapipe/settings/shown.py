"""Settings as they may be shown to people: without what is secret."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from msgspec import structs

from datapipe.settings.plugins import OURS
from datapipe.settings.values import SECRETS

if TYPE_CHECKING:
    from datapipe.settings import Settings

HIDDEN = "***"


def shown(settings: Settings) -> dict[str, Any]:
    """All settings by their keys, in values that JSON has; what is secret in them is hidden."""
    return {key: _shown(settings, key) for key in settings.__struct_fields__}


def _shown(settings: Settings, key: str) -> Any:
    value = getattr(settings, key)
    if not value or key not in SECRETS:
        return value
    if key == "database_url":
        ours = settings.sink_kind in OURS["sink"]
        return _url(value) if ours else f"{settings.sink_kind}:{HIDDEN}"
    if key == "nats_url":
        return ",".join(_nats_url(url) for url in value.split(","))
    if isinstance(value, dict):
        return dict.fromkeys(value, HIDDEN)
    return [_ingest_key(each) for each in value] if isinstance(value, list) else HIDDEN


def _ingest_key(entry: Any) -> Any:
    """A key alone, or one with a name and what may be done with it."""
    return HIDDEN if isinstance(entry, str) else structs.asdict(entry) | {"key": HIDDEN}


def _url(url: str) -> str:
    """With its user and without its password, wherever it stands."""
    url = re.sub(r"(://[^:/@]*):[^/]*@", rf"\1:{HIDDEN}@", url)
    front, mark, query = url.partition("?")
    return front + mark + "&".join(map(_option, query.split("&")))


def _option(text: str) -> str:
    name, mark, _ = text.partition("=")
    return f"{name}{mark}{HIDDEN}" if "password" in unquote(name).lower() else text


def _nats_url(url: str) -> str:
    """A login without a password is a token."""
    return re.sub(r"(://(?:[^:/@]*:)?)[^/]*@", rf"\1{HIDDEN}@", url)

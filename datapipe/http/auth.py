"""Who may look, and who may act: contract section 4, "The rest"."""

from __future__ import annotations

import hmac
import ipaddress
from typing import NamedTuple
from urllib.parse import urlsplit

from aiohttp import BasicAuth, web

from datapipe.errors import Reason, Refused
from datapipe.settings import Settings


class Credentials(NamedTuple):
    """What a request says about who sends it: a header, and `?key=`."""

    authorization: str | None
    in_query: str | None = None


class Access:
    """Decides by the settings and the request alone."""

    def __init__(self, settings: Settings) -> None:
        self._loopback = _is_loopback(settings.host)
        self.reload(settings.admin_key)

    def reload(self, admin_key: str) -> None:
        """From now on this one counts; without one, where the service listens."""
        self._admin_key = admin_key.encode()

    def may_look(self, request: web.BaseRequest) -> None:
        """Status pages are open unless an admin key is set. Raises: Refused."""
        if self._admin_key and (denied := self.why_not(request)) is not None:
            raise denied

    def may_act(self, request: web.BaseRequest) -> None:
        """Without an admin key only from this machine, and from no other site's page.

        The `Host` header must name loopback, or a page of another site could reach us under a
        name of its own that resolves to this machine (DNS rebinding). Raises: Refused.
        """
        if (denied := self.why_not(request)) is not None:
            raise denied
        if not _same_origin(request):
            raise Refused(Reason.FORBIDDEN, "this request comes from another site's page")

    def why_not(self, request: web.BaseRequest) -> Refused | None:
        """Why this client may not act, from whatever page, and how it could; or None."""
        if self._admin_key:
            given = given_key(Credentials(request.headers.get("Authorization")))
            if hmac.compare_digest(given, self._admin_key):
                return None
            return Refused(Reason.UNAUTHORIZED, "the admin key is missing or wrong")
        if not self._loopback:
            return Refused(
                Reason.FORBIDDEN,
                "the service may be reached from other machines: set admin_key, which is then "
                "asked for, or (but not under gunicorn) host to 127.0.0.1",
            )
        if not _is_loopback(_host_name(request.headers.get("Host", ""))):
            return Refused(
                Reason.FORBIDDEN,
                "the address does not name this machine: use http://127.0.0.1 (from elsewhere "
                "through ssh -L), or set admin_key, which is then asked for",
            )
        return None


def given_key(given: Credentials) -> bytes:
    """The key of a request: Bearer, the password of HTTP Basic, or `?key=`; else empty."""
    header = given.authorization or ""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode(errors="surrogateescape")
    if scheme.lower() == "basic":
        try:
            password: str = BasicAuth.decode(header, encoding="utf-8").password
            return password.encode()
        except ValueError:
            return b""
    return (given.in_query or "").encode(errors="surrogateescape")


def _same_origin(request: web.BaseRequest) -> bool:
    if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
        return False
    origin = request.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("Host", "")


def _host_name(host: str) -> str:
    """`[::1]:80` -> `::1`, `localhost:80` -> `localhost`."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

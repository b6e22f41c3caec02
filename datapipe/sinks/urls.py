"""The URL of a database: of a server, or of a file.

That of a file is `scheme:///path`, as it is, nothing escaped. So `scheme:///events.db` is relative,
and `scheme:////var/lib/events.db` absolute.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from datapipe.errors import ConfigError

_MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
_OPTIONS = ("ssl-mode", "ssl-ca", "ssl-cert", "ssl-key")
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:[0-9]*)?")


def file_path(url: str) -> Path:
    """The path; a relative one where the URL has one."""
    return Path(url.partition(":///")[2])


def file_fault(url: str) -> str | None:
    """What is wrong with the URL, and the remedy; not the URL itself: it is taken for a secret."""
    scheme, _, rest = url.partition(":")
    relative, absolute = f"{scheme}:///events.db", f"{scheme}:////var/lib/events.db"
    if ":memory:" in rest:
        return f"must name a file: what is in memory ends with the process; such as {relative}"
    path = rest.removeprefix("///")
    if "?" in path:
        return "must end with the path: what follows '?' would be options, and it has none"
    if path == rest or path.endswith("/") or not path or "\0" in path:
        return (
            f"must be like {relative}, three slashes and a path relative to the settings file, "
            f"or {absolute}, four and an absolute one"
        )
    return None


def absolute_url(url: str, folder: Path) -> str:
    """The same with an absolute path. Args: folder: what a relative one starts from."""
    return f"{url.partition(':')[0]}:///{folder.absolute() / file_path(url)}"


def login_fault(url: str, ends: str) -> str | None:
    """What is wrong with the user and password of a URL, and the remedy; shows none of them.

    Args: ends: the characters of which the first ends the user, password and host.
    """
    rest = url.partition("://")[2]
    authority = re.split(f"[{ends}]", rest, maxsplit=1)[0]
    login, at, _ = authority.partition("@")
    if at:
        # up to the options: a password that has a slash, too, ends in what looks like the path
        fine = "@" not in rest[len(login) + 1 :].partition("?")[0] and not _PERCENT.search(login)
    else:  # a host, or a password that was cut off within
        hosts = authority.partition("?")[0].split(",")
        fine = "@" not in rest or all(_HOST.fullmatch(each) for each in hosts)
    if fine:
        return None
    return (
        "in its user and password '%' is written %25, '@' %40, ':' %3A, '/' %2F, '?' %3F and "
        "'#' %23 (percent-encoding); one of them stands there as it is"
    )


@dataclass(frozen=True)
class Address:
    """Where the database is. Attributes: tls: None: without; required: never without."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    tls: ssl.SSLContext | None
    required: bool


def server_address(url: str, default_port: int) -> Address:
    """What the URL of a server names: `scheme://user:password@host:port/database?ssl-mode=...`.

    Its options are those of MySQL's tools. On a Heroku dyno TLS is required: the network between it
    and its database is public.

    Raises: ConfigError: it can't be used; it is not repeated, for it holds a password.
    """
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        port = parts.port or default_port
    except ValueError:
        raise ConfigError("can't be read as a URL") from None
    if unknown := options.keys() - set(_OPTIONS):
        raise ConfigError(f"{min(unknown)!r} is not one of {', '.join(_OPTIONS)}")
    database = unquote(parts.path.lstrip("/"))
    if not parts.hostname or not database:
        raise ConfigError(
            f"must be like {parts.scheme}://user:password@host:{default_port}/database"
        )
    default = "VERIFY_CA" if "ssl-ca" in options else "PREFERRED"
    mode = options.get("ssl-mode", "REQUIRED" if os.environ.get("DYNO") else default).upper()
    if mode not in _MODES:
        raise ConfigError(f"ssl-mode is not one of {', '.join(_MODES)}")
    return Address(
        parts.hostname, port, unquote(parts.username or ""), unquote(parts.password or ""),
        database, None if mode == "DISABLED" else _tls(mode, options),
        mode not in ("DISABLED", "PREFERRED"),
    )  # fmt: skip


def _tls(mode: str, options: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("ssl-ca"))
        context.check_hostname = mode == "VERIFY_IDENTITY"
        context.verify_mode = ssl.CERT_REQUIRED if "VERIFY" in mode else ssl.CERT_NONE
        if certificate := options.get("ssl-cert"):
            context.load_cert_chain(certificate, options.get("ssl-key"))
    except OSError as exc:
        raise ConfigError(f"ssl-ca, ssl-cert or ssl-key: {exc}") from None
    # certificates that MySQL makes for itself lack what is strictly wanted
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context

"""The URL of a database that is a file: `scheme:///path`, as it is, nothing escaped.

So `scheme:///events.db` is relative, and `scheme:////var/lib/events.db` absolute.
"""

from __future__ import annotations

from pathlib import Path


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

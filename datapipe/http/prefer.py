"""`Prefer: wait=N`: answer once the events are loaded, or after N seconds.

Source: RFC 7240, sections 2 (syntax) and 4.3 (wait).
"""

from __future__ import annotations

import re

from datapipe.http.body import Headers

MOST_S = 25  # less than proxies and clients wait for an answer: 30 s, many of them

# preferences, separated by commas that stand in no quoted string; takes time linear in its length
_PREFERENCE = re.compile(r'(?:[^",]++|"(?:[^"\\]++|\\.)*+"?+)++')
_WAIT = re.compile(r'[ \t]*+wait[ \t]*+=[ \t]*+("?)([0-9]++)\1[ \t]*+(?:;.*)?', re.IGNORECASE)


def wait_seconds(headers: Headers) -> int | None:
    """For how long a request asks to wait, at most `MOST_S`; None: it does not, or malformed."""
    if "Prefer" not in headers:
        return None
    for preference in _PREFERENCE.findall(", ".join(headers.getall("Prefer"))):
        if (found := _WAIT.fullmatch(preference)) is not None:
            return int(min(MOST_S, float(found[2])))  # which takes any number of digits
    return None

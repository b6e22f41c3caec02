"""`traceparent`: the trace that a request belongs to, so that what is told of it is found there.

datapipe makes no spans and sends no traces: the caller's own span is named. Nothing is answered.
Source: W3C Trace Context, section 3.2.
"""

from __future__ import annotations

import re

from datapipe.http.body import Headers

# version, trace id, the caller's span, flags. Versions to come may add to it; ff is none, nor are
# ids of zeros
_FORM = re.compile(
    r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?"
)


def trace_ids(headers: Headers) -> dict[str, str]:
    """The keys `trace_id` and `span_id`, as logs name them; none if there is no trace.

    What is malformed, or there twice, is ignored.
    """
    values = headers.getall("traceparent", ())
    if len(values) != 1 or (found := _FORM.fullmatch(values[0])) is None:
        return {}
    return {"trace_id": found[1], "span_id": found[2]}

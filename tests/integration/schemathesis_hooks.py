"""What Schemathesis has to be taught: that NDJSON is text."""

import schemathesis

schemathesis.serializer.alias("application/x-ndjson", "text/plain")

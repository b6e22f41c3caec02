"""What databases that speak SQL do alike: tables, ledger, heartbeats, dead letters.

Written once in SQL that all of them have; in what they differ is a `Dialect`. A database brings a
`SqlTransaction` for its loads and is a `SqlSink`.
"""

from __future__ import annotations

from datapipe.sinks.sql_ledger import SqlLedger
from datapipe.sinks.sql_shelves import SqlShelves


class SqlSink(SqlLedger, SqlShelves):
    """See `Database`. A subclass says how statements reach its server, and sets `product`."""

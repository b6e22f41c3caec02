"""What the suites of both interfaces share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packages import install


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """tests/contract/toys, installed and importable: `mirror: toy` and `toy://` name its plug-ins.

    A suite has them as a parameter like any other: add `"toy"` to its params, have the fixture ask
    for this one (`request.getfixturevalue("toys")` where only that parameter needs it), and open
    by `open_mirror(Settings(mirror="toy", ...))` or `open_sink(Settings(database_url="toy://"))`.
    """
    target = tmp_path_factory.mktemp("toys") / "installed"
    install(Path(__file__).parent / "toys", target)
    sys.path.append(str(target))
    yield target
    sys.path.remove(str(target))

"""What the suites of both interfaces share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packages import install


@pytest.fixture(scope="module")  # not longer: what is importable is listed elsewhere, too
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """tests/contract/toys, installed and importable: `mirror: toy` and `toy://` name its plug-ins.

    A suite names one as anybody would: `open_mirror(Settings(mirror="toy"), ...)`, and
    `open_sink(Settings(database_url=f"toy://{file}"), ...)`.
    """
    target = tmp_path_factory.mktemp("toys") / "installed"
    install(Path(__file__).parent / "toys", target)
    sys.path.append(str(target))
    yield target
    sys.path.remove(str(target))

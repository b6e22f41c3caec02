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

    Each of its modules ends with what its entry point names:

        class ToyPlugin(MirrorPlugin):  # or SinkPlugin
            def open(self, settings, process):
                return open_toy(settings, process)

    A suite has a toy as a parameter like any other: `"toy"` among the params of its fixture, which
    asks for this one (by `request.getfixturevalue("toys")`, where only that parameter needs it) and
    opens it by `open_mirror(Settings(mirror="toy", ...), ...)`, or by
    `open_sink(Settings(database_url=f"toy://{file}"), ...)`.
    """
    target = tmp_path_factory.mktemp("toys") / "installed"
    install(Path(__file__).parent / "toys", target)
    sys.path.append(str(target))
    yield target
    sys.path.remove(str(target))

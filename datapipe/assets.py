"""Where the page's templates lie: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path


def templates_folder() -> Path:
    """The folder of templates, script and style."""
    package = Path(__file__).parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"

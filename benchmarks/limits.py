"""What holds a figure back, by its goal: the page tells it while the goal is missed."""

from __future__ import annotations

LIMITS: dict[str, str] = {}

"""Figures that pages take from the benchmarks are those that were measured last."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT


def measured(part: str, table: str, rival: str) -> list[float]:
    """The cells of one line of docs/benchmarks.md, without the spread."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    text = text.split(f"\n## {part}\n")[1].split("\n## ")[0]
    text = text.split(f"\n### {table}\n")[1].split("\n### ")[0]
    (line,) = re.findall(rf"^\| {re.escape(rival)} \|(.*)\|$", text, re.MULTILINE)
    cells = [re.sub(r"<sub>.*?</sub>|[,\s]", "", cell) for cell in line.split("|")]
    return [float(cell) if cell else 1.0 for cell in cells]


def told(page: str, words: str) -> list[float]:
    """The numbers that a page has where `#` stands in these words."""
    text = " ".join((ROOT / page).read_text().split())
    pattern = re.escape(words).replace(r"\#", r"([\d.,]*\d)").replace(r"\ \.\.\.\ ", " .*? ")
    found = re.search(pattern, text)
    assert found, f"{page} does not say {words!r}"
    return [float(number.replace(",", "")) for number in found.groups()]


def test_the_readme() -> None:
    single, batches = "Single events", "Batches"
    insert = "Fastify + postgres, an INSERT each"
    words = "# times as many single events as Fastify ... # times as many as an ... nothing: #"
    assert told("README.md", words) == pytest.approx(
        [
            measured(single, "64 connections", insert)[1],
            measured(single, "64 connections", "bare aiohttp")[1],
            measured(single, "64 connections", "datapipe")[0],
        ],
        rel=0.03,
    )
    of_batches = measured(batches, "1,000 events a POST, as a JSON array", insert)[1]
    assert told("README.md", "POSTs of 1,000 events it is # times") == pytest.approx(
        [of_batches], rel=0.05
    )


def test_scale() -> None:
    assert told("docs/scale.md", "# single events a second, or # in arrays of 1,000") == (
        pytest.approx(
            [
                measured("Single events", "64 connections", "datapipe")[0],
                measured("Batches", "1,000 events a POST, as a JSON array", "datapipe")[0],
            ],
            rel=0.03,
        )
    )
    two = measured("Several processes", "256 connections", "2 processes")
    assert told("docs/scale.md", "# times as many on two cores") == pytest.approx([two[1]], rel=0.1)

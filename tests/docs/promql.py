"""As much of Prometheus as our alert rules need: scrapes, PromQL over them, rules with `for`.

The syntax tree is promql-parser's. What none of our rules uses raises NotImplementedError: rather
teach it here than have a rule that nobody has tried.

Source of what it means: Prometheus's documentation, "Querying basics", "Operators", "Functions",
"Alerting rules"; for the ends of a rate's range `extrapolatedRate` in its promql/functions.go.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

_LOOKBACK_S = 300.0  # how long a sample speaks for its series, if nothing newer does
Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Samples = list[tuple[float, float | None]]  # None: the series ended here

_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "*": operator.mul, "-": operator.sub, "/": lambda a, b: _divided(a, b),
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq, ">": operator.gt,
}  # fmt: skip
_AGGREGATES: dict[str, Callable[[Iterable[float]], float]] = {"sum": sum, "max": max}
_HUMANIZERS = ("humanize", "humanizePercentage", "humanizeDuration")


@dataclass
class Rule:
    """An alert rule. Attributes: active: since when it has held, by labels, in seconds."""

    alert: str
    expression: str
    for_s: float
    annotations: dict[str, str]
    active: dict[Labels, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rule: dict[str, Any]) -> Rule:
        for_s = promql.parse_duration(rule["for"]).total_seconds()
        return cls(rule["alert"], rule["expr"], for_s, rule["annotations"])


class Prometheus:
    """Attributes: now: its clock, in seconds, which the test turns."""

    def __init__(self, rules: Iterable[Rule] = (), job: str = "datapipe") -> None:
        self.now = 0.0
        self.rules = list(rules)
        self._job = job
        self._series: dict[tuple[str, Labels], Samples] = {}

    def scrape(self, instance: str, text: str | None) -> None:
        """Take what a target shows now; None: it does not answer, which ends its series."""
        target = {"job": self._job, "instance": instance}
        shown = {("up", frozenset(target.items())): float(text is not None)}
        for family in text_string_to_metric_families(text or ""):
            for sample in family.samples:
                shown[sample.name, frozenset({**sample.labels, **target}.items())] = sample.value
        for key in self._series.keys() - shown.keys():
            if frozenset(target.items()) <= key[1]:
                self._series[key].append((self.now, None))
        for key, value in shown.items():
            self._series.setdefault(key, []).append((self.now, value))

    def ask(self, expression: str) -> float | Vector:
        """What an expression is now. Raises: ValueError: no PromQL; NotImplementedError."""
        return self._value(promql.parse(expression))

    def firing(self) -> dict[str, list[str]]:
        """Evaluate the rules now: by name, those that fire, with their summaries and actions."""
        found: dict[str, list[str]] = {}
        for rule in self.rules:
            result = self.ask(rule.expression)
            assert isinstance(result, dict), f"{rule.alert} is no vector"
            rule.active = {labels: rule.active.get(labels, self.now) for labels in result}
            for labels, since in rule.active.items():
                said = [rendered(text, labels) for text in rule.annotations.values()]
                if self.now - since >= rule.for_s:
                    found.setdefault(rule.alert, []).append(" ".join(said))
        return found

    def _value(self, node: Any) -> Any:
        match node:
            case promql.NumberLiteral():
                return float(node.val)
            case promql.ParenExpr():
                return self._value(node.expr)
            case promql.VectorSelector():
                return dict(self._instant(node))
            case promql.AggregateExpr():
                return _aggregated(node, self._value(node.expr))
            case promql.BinaryExpr():
                if node.modifier is not None:
                    raise NotImplementedError(node.prettify())
                return _binary(str(node.op), self._value(node.lhs), self._value(node.rhs))
            case promql.Call():
                return self._call(node.func.name, node.args)
        raise NotImplementedError(node.prettify())

    def _call(self, name: str, args: list[Any]) -> float | Vector:
        (of,) = args
        match name, of:
            case "rate", promql.MatrixSelector():
                return dict(self._rates(of))
            case "scalar", _:
                vector = self._value(of)
                return float(*vector.values()) if len(vector) == 1 else math.nan
            case "absent", promql.VectorSelector():
                equal = [m for m in of.matchers.matchers if m.op == promql.MatchOp.Equal]
                labels = frozenset((each.name, each.value) for each in equal)
                return {} if self._value(of) else {labels: 1.0}
        raise NotImplementedError(name)

    def _instant(self, selector: Any) -> Iterator[tuple[Labels, float]]:
        for labels, samples in self._selected(selector):
            at, value = samples[-1]
            if value is not None and self.now - at < _LOOKBACK_S:
                yield labels, value

    def _rates(self, matrix: Any) -> Iterator[tuple[Labels, float]]:
        range_s = matrix.range.total_seconds()
        for labels, samples in self._selected(matrix.vector_selector):
            within = [(t, v) for t, v in samples if v is not None and t > self.now - range_s]
            if len(within) > 1:
                yield labels, _increase(within, self.now - range_s, self.now) / range_s

    def _selected(self, selector: Any) -> Iterator[tuple[Labels, Samples]]:
        if selector.offset or selector.at:
            raise NotImplementedError(selector.prettify())
        for (name, labels), samples in self._series.items():
            if name == selector.name and all(
                _matches(matcher, dict(labels)) for matcher in selector.matchers.matchers
            ):
                yield labels, samples


def rendered(text: str, labels: Labels) -> str:
    """An annotation as people get it. Raises: AssertionError: it names what this alert has not."""
    known = dict(labels)

    def put(found: re.Match[str]) -> str:
        name, humanizer = found[1], found[2]
        assert name or humanizer in (None, *_HUMANIZERS), found[0]
        assert not name or name in known, f"{found[0]}: there are {sorted(known)}"
        return known[name] if name else "N"

    said = re.sub(r"\{\{ \$(?:labels\.(\w+)|value(?: \| (\w+))?) \}\}", put, text)
    assert "{{" not in said, said
    return said


def _matches(matcher: Any, labels: dict[str, str]) -> bool:
    value = labels.get(matcher.name, "")
    if matcher.op == promql.MatchOp.Equal:
        return bool(value == matcher.value)
    if matcher.op == promql.MatchOp.NotEqual:
        return bool(value != matcher.value)
    raise NotImplementedError(str(matcher.op))


def _increase(samples: list[tuple[float, float]], start: float, end: float) -> float:
    """Of a counter over a range, which ends reach out to as far as samples lie apart."""
    (first_at, first), (last_at, last) = samples[0], samples[-1]
    values = [value for _, value in samples]
    resets = sum(before for before, after in pairwise(values) if after < before)
    increase, sampled = last - first + resets, last_at - first_at
    apart = sampled / (len(samples) - 1)
    before, after = first_at - start, end - last_at
    before = before if before < 1.1 * apart else apart / 2
    after = after if after < 1.1 * apart else apart / 2
    if increase > 0:  # a counter was never less than 0
        before = min(before, sampled * first / increase)
    return increase * (sampled + before + after) / sampled


def _aggregated(node: Any, vector: Vector) -> Vector:
    name, modifier = str(node.op), node.modifier
    if name not in _AGGREGATES or node.param is not None:
        raise NotImplementedError(node.prettify())
    named = set(modifier.labels) if modifier else set()
    without = modifier is not None and modifier.type == promql.AggModifierType.Without
    groups: dict[Labels, list[float]] = {}
    for labels, value in vector.items():
        kept = frozenset((k, v) for k, v in labels if (k in named) != without)
        groups.setdefault(kept, []).append(value)
    return {labels: _AGGREGATES[name](values) for labels, values in groups.items()}


def _binary(op: str, left: Any, right: Any) -> Any:
    """Vectors are matched by all of their labels; a comparison keeps what holds, as it is."""
    if op in _ARITHMETIC:
        if isinstance(left, float) and isinstance(right, float):
            return _ARITHMETIC[op](left, right)
        return {k: _ARITHMETIC[op](a, b) for k, (a, b) in _paired(left, right).items()}
    if op in _COMPARISONS and isinstance(left, dict):
        return {k: a for k, (a, b) in _paired(left, right).items() if _COMPARISONS[op](a, b)}
    raise NotImplementedError(op)


def _paired(left: Any, right: Any) -> dict[Labels, tuple[float, float]]:
    if isinstance(left, float):
        return {labels: (left, value) for labels, value in right.items()}
    if isinstance(right, float):
        return {labels: (value, right) for labels, value in left.items()}
    return {labels: (left[labels], right[labels]) for labels in left.keys() & right.keys()}


def _divided(left: float, right: float) -> float:
    if right:
        return left / right
    return math.nan if not left or math.isnan(left) else math.copysign(math.inf, left)

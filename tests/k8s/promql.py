"""What a PromQL expression asks for: the series it names, and the labels that they must have."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import promql_parser as promql

Sample = tuple[str, Mapping[str, str]]  # a series' name and labels
OPERATORS = ((promql.MatchOp.Equal, "="), (promql.MatchOp.NotEqual, "!="), (promql.MatchOp.Re, "=~"), (promql.MatchOp.NotRe, "!~"))
VARIABLES = {"$__rate_interval": "5m"}  # Grafana's, where a label's value or a duration is expected


@dataclass(frozen=True)
class Selector:
    """`labels` are those that the series is grouped, matched or joined by; `matchers` (label, operator, value) of those with a value."""

    name: str
    labels: frozenset[str]
    matchers: tuple[tuple[str, str, str], ...]

    def is_found(self, samples: Iterable[Sample], added: frozenset[str]) -> bool:
        """Whether a series has the name, the labels but those `added` when it is scraped, and for each matcher a value that fits."""
        of_name = [labels for name, labels in samples if name == self.name and self.labels - added <= set(labels)]
        wanted = [matcher for matcher in self.matchers if matcher[0] not in added]
        return bool(of_name) and all(any(_fits(labels, matcher) for labels in of_name) for matcher in wanted)


def _fits(labels: Mapping[str, str], matcher: tuple[str, str, str]) -> bool:
    label, operator, value = matcher
    if value.startswith("$"):
        return label in labels
    is_equal = label in labels and re.fullmatch(value if "~" in operator else re.escape(value), labels[label]) is not None
    return is_equal != operator.startswith("!")


def selectors(expression: str) -> tuple[Selector, ...]:
    """Every selector of the expression, alternatives of a pattern (`a|b`) one by one. ValueError if it does not parse."""
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    found: list[Selector] = []
    _walk(promql.parse(expression), frozenset(), found)
    return tuple(found)


def _walk(node: promql.Expr, labels: frozenset[str], found: list[Selector]) -> None:
    match node:
        case promql.VectorSelector():
            found.extend(_of(node, labels))
        case promql.MatrixSelector():
            found.extend(_of(node.vector_selector, labels))
        case promql.AggregateExpr():
            _walk(node.expr, labels | _named(node.modifier), found)
        case promql.BinaryExpr():
            joined = node.modifier.matching if node.modifier else None
            for side in (node.lhs, node.rhs):
                _walk(side, labels | _named(joined), found)
        case promql.Call():
            for part in node.args:
                _walk(part, labels, found)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            _walk(node.expr, labels, found)


def _named(modifier: promql.LabelModifier | promql.AggModifier | None) -> frozenset[str]:
    return frozenset(modifier.labels) if modifier is not None else frozenset()


def _of(selector: promql.VectorSelector, labels: frozenset[str]) -> list[Selector]:
    matchers = []
    for matcher in selector.matchers.matchers:
        (operator,) = (text for kind, text in OPERATORS if kind == matcher.op)
        values = matcher.value.split("|") if "~" in operator else [matcher.value]
        matchers += [(matcher.name, operator, value) for value in values]
    return [Selector(selector.name, labels | {label for label, *_ in matchers}, tuple(matchers))]

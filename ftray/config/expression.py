"""Expressions over config keys, such as `2 * adapter.rank`: a fixed small grammar, and nothing of Python beyond it."""

import ast
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "sqrt": math.sqrt, "round": round}
GRAMMAR = (
    f"numbers, strings, null, dotted keys, + - * / // **, comparisons, A if CONDITION else B, {', '.join(FUNCTIONS)}()"
)
MAX_EXPONENT = 64
NULL = "null"


@dataclass(frozen=True)
class Expression:
    """`2 * adapter.rank`"""

    text: str

    def __post_init__(self) -> None:
        """Raises ValueError where it is outside the grammar."""
        check_node(self._body)

    @property
    def keys(self) -> list[str]:
        """The dotted keys that it needs, in order."""
        return list(dict.fromkeys(keys_of(self._body)))

    def evaluate(self, value_of: Callable[[str], Any]) -> Any:
        """Raises ValueError where it has no value, such as a division by zero."""
        try:
            return evaluate(self._body, value_of)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"expression {self.text!r}: {error}") from None

    @property
    def _body(self) -> ast.expr:
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"expression {self.text!r}: {error.msg}") from None


def check_node(node: ast.AST) -> None:
    if dotted(node) is not None or (isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str))):
        return
    if isinstance(node, (ast.BinOp, ast.UnaryOp)) and type(node.op) in OPERATORS:
        parts = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATORS:
        parts = [node.left, node.comparators[0]]
    elif isinstance(node, ast.IfExp):
        parts = [node.test, node.body, node.orelse]
    elif isinstance(node, ast.Call) and not node.keywords and node.args and dotted(node.func) in FUNCTIONS:
        parts = list(node.args)
    else:
        raise ValueError(f"{ast.unparse(node)!r} is not understood; an expression has {GRAMMAR}")
    for part in parts:
        check_node(part)


def dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)) is not None:
        return f"{owner}.{node.attr}"
    return None


def keys_of(node: ast.AST) -> Iterator[str]:
    name = dotted(node)
    if name is not None:
        yield from () if name == NULL else (name,)
        return
    children = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    for child in children:
        yield from keys_of(child)


def evaluate(node: ast.AST, value_of: Callable[[str], Any]) -> Any:
    name = dotted(node)
    if name is not None:
        return None if name == NULL else value_of(name)
    match node:
        case ast.Constant():
            return node.value
        case ast.BinOp():
            left, right = evaluate(node.left, value_of), evaluate(node.right, value_of)
            if isinstance(node.op, ast.Pow) and abs(right) > MAX_EXPONENT:
                raise ValueError(f"an exponent of {right} is beyond {MAX_EXPONENT}")
            return OPERATORS[type(node.op)](left, right)
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](evaluate(node.operand, value_of))
        case ast.Compare():
            left, right = evaluate(node.left, value_of), evaluate(node.comparators[0], value_of)
            return OPERATORS[type(node.ops[0])](left, right)
        case ast.IfExp():
            return evaluate(node.body if evaluate(node.test, value_of) else node.orelse, value_of)
        case ast.Call():
            return FUNCTIONS[str(dotted(node.func))](*(evaluate(part, value_of) for part in node.args))
    raise AssertionError("check_node let it through")

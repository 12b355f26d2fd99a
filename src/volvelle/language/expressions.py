"""Reading arithmetic that a model wrote, without running it: no `eval`, no names, no towers of powers."""

from __future__ import annotations

import ast
import math
import string
from fractions import Fraction

FUNCTIONS = frozenset("sin cos tan cot sec csc asin acos atan sinh cosh tanh asinh acosh atanh exp log ln sqrt Abs".split())
ARITHMETIC = frozenset("0123456789+-*/() ")
SYMBOLIC = ARITHMETIC | frozenset(string.ascii_letters + "_.,")
LONGEST = 400  # characters
LARGEST = 100  # total power to which anything may be raised


def _tree(text: str, allowed: frozenset[str]) -> ast.expr | None:
    if len(text) > LONGEST or not set(text.strip()) <= allowed:
        return None
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def arithmetic(text: str) -> Fraction | None:
    """The exact value of an expression of whole numbers with + - * / and parentheses; None for anything else and for division by 0."""
    tree = _tree(text, ARITHMETIC)
    try:
        return None if tree is None else _value(tree)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError(ast.dump(node))


def numbers_used(text: str) -> list[int]:
    """The whole numbers that stand in an expression, sorted; [] where it cannot be read."""
    tree = _tree(text, ARITHMETIC)
    return [] if tree is None else sorted(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is int)


def harmless(text: str) -> bool:
    """Whether a symbolic expression may be given to a reader that executes what it reads (sympy's parse_expr).

    Only numbers, names, + - * / **, signs, and calls of elementary functions; no attributes, no strings, and no power tower that
    would take more than a moment to compute.
    """
    tree = _tree(text, SYMBOLIC)
    try:
        return tree is not None and _degree(tree) <= LARGEST
    except (ValueError, RecursionError):
        return False


def _degree(node: ast.expr) -> float:
    """A bound on the power to which anything below `node` is raised. ValueError for a construction that is not allowed."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return 1
    if isinstance(node, ast.Name) and "__" not in node.id and (len(node.id) <= 2 or node.id in FUNCTIONS):
        return 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return _degree(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and len(node.args) == 1 and not node.keywords:
        return _degree(node.args[0])
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        return max(_degree(node.left), _degree(node.right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        return _degree(node.left) + _degree(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _degree(node.left) * _power(node.right)
    raise ValueError(type(node).__name__)


def _power(node: ast.expr) -> float:
    """A bound on an exponent: the product of its constants, so that no sum or product of them exceeds it by much."""
    size = math.prod(max(2.0, abs(n.value)) for n in ast.walk(node) if isinstance(n, ast.Constant) and type(n.value) in (int, float))
    if any(isinstance(n, ast.Pow) for n in ast.walk(node)):
        raise ValueError("power of a power")
    return max(size, _degree(node))

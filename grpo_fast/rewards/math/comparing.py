r"""Which answers are equal. The table; each line is tested (`tests/rewards_corpus_math.py`).

| Gold | Equal | Not equal |
|---|---|---|
| any | the same text, however LaTeX or unicode spell it | |
| number `1/2` | `0.5`, `\frac12`, `2/4`, `\frac{2}{4}`, `50\%` | `0.50001` |
| decimal | within 1e-6 of the gold value, relatively: `1.414214` is `\sqrt2` | `3.1416` is not `\pi` |
| whole `1000000` | what is within 1e-6 of it: `1000000.0` | `1000000.5` |
| `0` | `-0`, `0.0` | `0.0000001` |
| `1000` | `1,000`, `1{,}000`, `1\,000`, `1 000`, `1e3`, `10^3`, `1000.0` | `1.000`, `1,00` |
| `\frac32` | `1\frac12`, `1 1/2`, `1.5` | |
| percent `50\%` | `50%`, `50 percent`, `0.5`, `1/2`, and `50`: a question asks for percent | `5000%`, `0.5%` |
| unit `10 cm` | `10`, `10\text{ cm}`, `10 centimeters`, `0.1 m` | `10 m`, `10\text{ cm}^2`, `10 apples` |
| no unit `10` | `10 cm`, `10 apples`, `\$10`, `10^\circ`, `10\%` (a unit on one side only is not compared) | |
| unknown unit `3 apples` | `3`, `3 apple` | `3 pears` |
| tuple `(1,2)` | `(1, 2)`, `1, 2` | `(2,1)`, `2, 1`, `[1,2]`, `\{1,2\}` |
| interval `[1,2)` | `x \in [1,2)`, `1 \le x < 2` | `(1,2)`, `[1,2]` |
| three or more `(1,2,3)` | `[1,2,3]`, `1,2,3` | another order |
| set `\{1,2\}` | `\{2,1\}`, `2, 1`, `1 and 2`, `\{1,1,2\}` | `(1,2)`, `[1,2]` |
| list `1, 2` | `2, 1`, `1 and 2`, `x=1 or x=2`, `\{1,2\}`, `(1,2)` | `1`, `1,1,2`, `(2,1)` |
| `x=1, y=2` | `y=2, x=1`, `(1,2)`, `1,2` | `2,1` |
| one in a set `4` | `\{4\}` | |
| union `(0,1)\cup(2,3)` | `(2,3)\cup(0,1)` | |
| `\pm 2` | `2, -2`, `\{-2,2\}` | `2` |
| assignment `x=4` | `4`, `x = 2+2 = 4` | `y=4` |
| equation `x+y=1` | `y=1-x`, `2x+2y=2` | `1`, `x+y=2` |
| inequality `x>1` | `1<x`, `(1,\infty)` | `x\ge1` |
| expression `2(x+1)` | `2x+2`, whatever math-verify proves equal | `2x+1` |
| ratio `3:4` | `3/4`, `6:8`, `0.75` | `4:3` |
| choice `A` to `J` | `a`, `(A)`, `A.`, `\text{(A)}`, `A) 12`, `option A` | `12`, `AB` |
| text `no solution` | `\text{No solution.}`: the same words, case and a full stop aside | `no` |
"""

from __future__ import annotations

import cmath
import zlib
from fractions import Fraction
from typing import Any

from grpo_fast.rewards.math import units
from grpo_fast.rewards.math.answers import Answer, UnreadableError, _parse, choice_letter, read
from grpo_fast.rewards.math.notation import plain

# digits of a numeric comparison of formulas
PRECISION = 30
# relative difference of two values, far above the rounding of 15 digits
DIFFERENT = 1e-6


def is_right(gold: Answer, text: str, *, tolerance: float = 1e-6) -> bool:
    """Whether an answer, as it is written, equals a gold answer.

    Args:
        gold: As `read_gold` gave it.
        text: The answer; read here, because what the gold answer is says how.
        tolerance: Of decimals, relative to the gold value.

    Raises:
        UnreadableError: If the text is no answer.
    """
    if gold.kind == "choice":
        letter = choice_letter(text)
        if letter is None and not plain(text):
            raise UnreadableError("empty")
        return letter == gold.text
    if gold.kind == "text":
        words = plain(text)
        if not words:
            raise UnreadableError("empty")
        return words == plain(gold.text)
    answer = read(text)
    if answer.kind == "text":
        raise UnreadableError("words where the gold answer is a formula")
    return equal(gold, answer, Fraction(str(tolerance)))


def equal(gold: Answer, answer: Answer, tolerance: Fraction) -> bool:
    """Whether two answers are equal by the table."""
    if gold.text == answer.text:
        return True
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return _is_proven(_full(gold), _full(answer)) if "relation" in (gold.kind, answer.kind) else False
    if "relation" in (gold.kind, answer.kind):
        return _relations_equal(gold, answer)
    if gold.items or answer.items or "set" in (gold.kind, answer.kind):
        return _collections_equal(gold, answer, tolerance)
    return _scalars_equal(gold, answer, tolerance)


def _relations_equal(gold: Answer, answer: Answer) -> bool:
    if gold.kind != answer.kind:
        other = answer if gold.kind == "relation" else gold
        is_equation = other.variable and not other.items
        if not is_equation and other.kind not in ("interval", "tuple", "union", "set"):
            # an equation is not its right-hand side
            return False
    return _is_proven(_full(gold), _full(answer))


def _full(answer: Answer) -> Any:
    return answer.expr if answer.kind == "relation" else _parse(answer.text)


def _collections_equal(gold: Answer, answer: Answer, tolerance: Fraction) -> bool:
    kinds = {gold.kind, answer.kind}
    a, b = _items(gold), _items(answer)
    if kinds <= {"tuple", "interval"}:
        if gold.kind != answer.kind:
            return False
        if gold.brackets != answer.brackets and (len(a) == 2 or gold.kind == "interval"):
            return False
        return _in_order(a, b, tolerance)
    if "interval" in kinds:
        return False
    if "tuple" in kinds:
        pair = gold if gold.kind == "tuple" else answer
        return "list" in kinds and (pair.brackets == "()" or len(a) != 2) and _in_order(a, b, tolerance)
    if _names_differ(a) != _names_differ(b):
        # x = 1, y = 2 against 1, 2
        return _in_order(a, b, tolerance)
    if "set" in kinds:
        return _covers(a, b, tolerance) and _covers(b, a, tolerance)
    return len(a) == len(b) and _matched(a, b, tolerance)


def _items(answer: Answer) -> tuple[Answer, ...]:
    return answer.items if answer.items or answer.kind == "set" else (answer,)


def _names_differ(items: tuple[Answer, ...]) -> bool:
    return len({item.variable for item in items if item.variable}) > 1


def _in_order(a: tuple[Answer, ...], b: tuple[Answer, ...], tolerance: Fraction) -> bool:
    return len(a) == len(b) and all(equal(x, y, tolerance) for x, y in zip(a, b, strict=True))


def _covers(a: tuple[Answer, ...], b: tuple[Answer, ...], tolerance: Fraction) -> bool:
    return all(any(equal(x, y, tolerance) for y in b) for x in a)


def _matched(a: tuple[Answer, ...], b: tuple[Answer, ...], tolerance: Fraction) -> bool:
    """Whether each item of `a` has one of its own in `b`."""
    left = list(b)
    for x in a:
        found = next((i for i, y in enumerate(left) if equal(x, y, tolerance)), None)
        if found is None:
            return False
        del left[found]
    return True


def _scalars_equal(gold: Answer, answer: Answer, tolerance: Fraction) -> bool:
    if gold.unit == answer.unit:
        return _values_equal(gold, answer, tolerance)
    if gold.unit and answer.unit:
        factor = None if "%" in (gold.unit, answer.unit) else units.conversion(answer.unit, gold.unit)
        return factor is not None and _values_equal(gold, answer, tolerance, factor=factor)
    if "%" in (gold.unit, answer.unit):
        hundredth = Fraction(1, 100) if answer.unit == "%" else Fraction(100)
        return any(_values_equal(gold, answer, tolerance, factor=factor) for factor in (Fraction(1), hundredth))
    return _values_equal(gold, answer, tolerance)


def _values_equal(gold: Answer, answer: Answer, tolerance: Fraction, *, factor: Fraction = Fraction(1)) -> bool:
    """Whether `gold` equals `factor` times `answer`, their units aside."""
    is_rounded = gold.is_decimal or answer.is_decimal
    if gold.value is not None and answer.value is not None:
        value = answer.value * factor
        return gold.value == value or (is_rounded and abs(gold.value - value) <= tolerance * _scale(gold.value))
    from sympy import Float, Rational

    a = gold.expr if gold.value is None else Rational(gold.value.numerator, gold.value.denominator)
    b = answer.expr if answer.value is None else Rational(answer.value.numerator, answer.value.denominator)
    if factor != 1:
        b = b * Rational(factor.numerator, factor.denominator)
    is_rounded = is_rounded or bool(a.atoms(Float) or b.atoms(Float))
    if is_rounded and not (a.free_symbols or b.free_symbols):
        scale = None if gold.value is None else _scale(gold.value)
        return _is_near(a, b, tolerance, scale)
    return _is_proven(a, b)


def _scale(value: Fraction) -> Fraction:
    """What the tolerance is relative to: a whole number, however large, is not met by a fraction beside it."""
    return min(abs(value), Fraction(1)) if value.denominator == 1 else abs(value)


def _is_near(a: Any, b: Any, tolerance: Fraction, scale: Fraction | None) -> bool:
    from sympy import N

    try:
        x, y = complex(N(a.doit(), PRECISION)), complex(N(b.doit(), PRECISION))
    except MemoryError:
        raise
    except Exception:
        # not numbers: a matrix, an undefined function
        return _is_proven(a, b)
    return abs(x - y) <= float(tolerance) * (abs(x) if scale is None else float(scale))


def _is_proven(a: Any, b: Any) -> bool:
    """Whether math-verify finds two sympy objects equal; what it cannot compare differs."""
    from math_verify import verify

    if _differ_at_a_point(a, b):
        return False
    try:
        return bool(verify([a], [b], timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:
        return False


def _differ_at_a_point(a: Any, b: Any) -> bool:
    """Whether two formulas have clearly different values for some values of their variables: no proof is tried then."""
    from sympy import Expr

    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return False
    try:
        x, y = _at_a_point(a), _at_a_point(b)
    except MemoryError:
        raise
    except Exception:
        # an undefined function, a sum without end: math-verify may know
        return False
    return cmath.isfinite(x) and cmath.isfinite(y) and abs(x - y) > DIFFERENT * max(abs(x), abs(y))


def _at_a_point(expr: Any) -> complex:
    # by name: a variable of one formula may be real and that of the other not
    names = sorted(expr.free_symbols, key=str)
    point = {symbol: 0.5 + 0.1 * (zlib.crc32(str(symbol).encode()) % 97) for symbol in names}
    return complex(expr.evalf(subs=point))

r"""Reading an answer: its kind, its exact value or its parts.

Numbers are read here, exactly; what else is a formula is read by latex2sympy, the parser of math-verify.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from grpo_fast.rewards.math import units
from grpo_fast.rewards.math.notation import normal_form, plain

Kind: TypeAlias = Literal[
    "number", "expression", "list", "set", "tuple", "interval", "union", "relation", "choice", "text"
]

# a power of ten within this is computed as a number; beyond, it is a formula
MOST_DIGITS = 400
MOST_ITEMS = 64
CHOICES = "ABCDEFGHIJ"


class UnreadableError(ValueError):
    """The text is not an answer that can be compared."""


@dataclass(frozen=True)
class Answer:
    """An answer as it was read.

    Attributes:
        kind: What it is.
        text: Its normal form, the whole of it.
        value: A number, exactly.
        is_decimal: Written with a decimal point, and so perhaps rounded.
        unit: A canonical unit, '%' for percent, '' for none.
        variable: x in `x = 4`; '' for none.
        brackets: Those of a tuple or an interval.
        items: Parts of a list, set, tuple, interval or union.
        expr: What latex2sympy made of an expression or a relation; None for others.
    """

    kind: Kind
    text: str
    value: Fraction | None = None
    is_decimal: bool = False
    unit: str = ""
    variable: str = ""
    brackets: str = ""
    items: tuple[Answer, ...] = ()
    expr: Any = field(default=None, compare=False)


def read_gold(text: str) -> Answer:
    """As `read`; a letter of a multiple choice and words are golds, too."""
    letter = choice_letter(text, of_gold=True)
    if letter is not None:
        return Answer("choice", text=letter)
    return read(text)


def choice_letter(text: str, *, of_gold: bool = False) -> str | None:
    r"""The letter of `A`, `(A)`, `A.`, `\text{A}`, `(A) 12`, `A: 12`, `option A`; a gold letter is a capital A to J."""
    stripped = normal_form(re.sub(r"\\(?:textbf|text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1 ", text)).strip()
    found = re.fullmatch(
        r"(?:(?:[Oo]ption|[Cc]hoice)\s+)?(?:\(\s*([A-Za-z])\s*\)(?:\s.*)?|([A-Za-z])\s*(?:[.):]\s*.*)?)", stripped
    )
    if found is None:
        return None
    letter = found.group(1) or found.group(2)
    if of_gold and letter not in CHOICES:
        return None
    return letter.upper() if letter.upper() in CHOICES else None


def read(text: str) -> Answer:
    """Read an answer.

    Raises:
        UnreadableError: If it is none.
    """
    try:
        return _read(normal_form(text))
    except RecursionError:
        # nobody writes an answer hundreds of brackets deep
        raise UnreadableError("too deep") from None


def _read(text: str) -> Answer:
    text = text.strip()
    if not text:
        raise UnreadableError("empty")
    if text == r"\emptyset":
        return Answer("set", text=text)
    bracketed = _bracketed(text)
    if bracketed is not None:
        return bracketed
    parts = _split(text, r"\\cup(?![a-zA-Z])")
    if len(parts) > 1:
        return Answer("union", text=text, items=tuple(_read(part) for part in parts))
    membership = _split(text, r"\\in(?![a-zA-Z])")
    if len(membership) == 2 and _is_variable(membership[0]):
        return replace(_read(membership[1]), variable=_name(membership[0]))
    if _is_words(text):
        return Answer("text", text=plain(text))
    parts = _list_parts(text)
    if len(parts) > 1:
        return _list(text, parts)
    relation = _relation(text)
    if relation is not None:
        return relation
    if r"\pm" in text or r"\mp" in text:
        plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
        minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return Answer("list", text=text, items=(_read(plus.lstrip(" +")), _read(minus)))
    return _scalar(text)


def _bracketed(text: str) -> Answer | None:
    """Tuples, intervals, sets and redundant parentheses: what is in one pair of brackets altogether."""
    for start, end in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("{", "}")):
        if not (text.startswith(start) and text.endswith(end)) or len(text) < len(start + end):
            continue
        inner = text[len(start) : -len(end)]
        if not _is_balanced(inner):
            continue
        if start == "{":
            return _read(inner)
        parts = _split(inner, r"[,;]")
        if start == "\\{":
            if re.search(r"\||\\mid(?![a-zA-Z])|:", inner):
                return None
            return Answer("set", text=text, items=_read_all(parts if inner.strip() else []))
        if start + end in ("()", "[]") and (len(parts) == 1 or _number(inner) is not None):
            return _read(inner)
        if len(parts) > 1:
            mixed = start + end in ("(]", "[)")
            if mixed and len(parts) != 2:
                raise UnreadableError("an interval has two ends")
            kind: Kind = "interval" if mixed or _has_infinity(parts) else "tuple"
            return Answer(kind, text=text, brackets=start + end, items=_read_all(parts))
    return None


def _has_infinity(parts: list[str]) -> bool:
    return any(r"\infty" in part for part in parts)


def _read_all(parts: list[str]) -> tuple[Answer, ...]:
    if len(parts) > MOST_ITEMS:
        raise UnreadableError(f"more than {MOST_ITEMS} items")
    return tuple(_read(part) for part in parts)


def _list_parts(text: str) -> list[str]:
    if _number(_unit(text)[0]) is not None:
        # a comma between thousands
        return [text]
    spread = _split(text, r"[,;](?:\s*(?:and|or)(?![a-zA-Z]))?|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
    return [part for part in spread if part.strip()]


def _list(text: str, parts: list[str]) -> Answer:
    items = _read_all(parts)
    names = {item.variable for item in items if item.variable}
    if items[0].variable and not any(item.variable for item in items[1:]):
        # the name stands once for all of a list
        items = tuple(replace(item, variable=items[0].variable) for item in items)
    variable = names.pop() if len(names) == 1 else ""
    return Answer("list", text=text, items=items, variable=variable)


def _relation(text: str) -> Answer | None:
    """Inequalities and equations; `x = 4` and `2 + 2 = 4` are their right-hand sides."""
    if re.search(r"<|>|\\(?:le|ge|ne|lt|gt|equiv)(?![a-zA-Z])", text):
        return Answer("relation", text=text, expr=_parse(text))
    sides = _split(text, r"=|\\approx(?![a-zA-Z])")
    if len(sides) == 1:
        return None
    if not all(side.strip() for side in sides):
        raise UnreadableError("an equation without a side")
    if _is_variable(sides[0]):
        is_function = "(" in sides[0]
        return replace(_read(sides[-1]), text=text, variable="" if is_function else _name(sides[0]))
    if re.search(r"[a-zA-Z]", re.sub(r"\\(?:frac|sqrt|times|cdot|pi|text\s*\{[^{}]*\})", "", sides[0])) is None:
        return _read(sides[-1])
    return Answer("relation", text=text, expr=_parse(text))


def _is_variable(text: str) -> bool:
    return re.fullmatch(r"\s*\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?\s*(?:\(\s*\w(?:\s*,\s*\w)*\s*\))?\s*", text) is not None


def _name(text: str) -> str:
    return re.sub(r"[\s{}]", "", text)


# words that are mathematics without a backslash
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "mod", "gcd", "lcm", "max", "min", "det", "lim"}
_WORD = re.compile(r"(?:^|(?<=\s))[^\W\d_]{3,}(?=$|\s)")


def _is_words(text: str) -> bool:
    """Whether it is text, not a formula: words of three letters or more, of other scripts, or no."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    if "\\" in bare or re.search(r"[\d=<>^_$%]", bare):
        return False
    words = re.findall(r"[^\W\d_]+", bare)
    if len(words) == 1 and words[0].casefold() in _FUNCTIONS | {"and", "or"}:
        return False
    if not words or re.fullmatch(r"[\w\s'\-.,!?/&]*", bare) is None:
        return False
    long = [word for word in words if len(word) >= 3 and word.casefold() not in {"and"}]
    return bool(long) or bare.casefold().strip() == "no" or not bare.isascii()


def _scalar(text: str) -> Answer:
    body, unit = _unit(text)
    number = _number(body)
    if number is not None:
        return Answer("number", text=text, value=number[0], is_decimal=number[1], unit=unit)
    if _WORD.search(re.sub(r"\\text\s*\{[^{}]*\}", "", body)) and not _FUNCTIONS & set(re.findall("[a-z]+", body)):
        raise UnreadableError("words among numbers")
    return Answer("expression", text=text, unit=unit, expr=_parse(body))


_EXPONENT = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_TEXT_UNIT = re.compile(rf"(.*?[^\s\\])\s*\\text\s*\{{([^{{}}]*)\}}({_EXPONENT})\s*", re.DOTALL)
_WORD_UNIT = re.compile(
    rf"([-+]?\s*(?:\\frac\s*\{{[^{{}}]*\}}\s*\{{[^{{}}]*\}}|[\d.,/ ]|\\times\s*10\s*\^\s*\{{?-?\d+\}}?)+?)"
    rf"(\s*)([^\W\d_]+\.?(?:[\s/-]+[^\W\d_]+){{0,3}}(?:\s*/\s*[a-zA-Z]+)?)({_EXPONENT})"
)


def _unit(text: str) -> tuple[str, str]:
    """A scalar and its unit."""
    text = text.strip()
    if text.endswith("%"):
        return text[:-1], "%"
    sign = re.match(r"([-+]?)\s*(?:US)?([$€£¥₹])\s*(?=[\d.\\(-])", text)
    if sign is not None:
        rest, unit = _unit(text[sign.end() :])
        return sign.group(1) + rest, units.canonical(unit or sign.group(2))
    if text[-1] in units.CURRENCIES + "¢":
        return text[:-1], units.canonical(text[-1])
    degrees = re.fullmatch(r"(.*)°\s*([CFK]?)", text, re.DOTALL)
    if degrees is not None and degrees.group(1).strip():
        return degrees.group(1), "°" + degrees.group(2).casefold()
    found = _TEXT_UNIT.fullmatch(text)
    if found is not None:
        # 10 \text{m}/\text{s}
        inner = re.fullmatch(r"(.*?)\s*\\text\s*\{([^{}]*)\}\s*/", found.group(1), re.DOTALL)
        if inner is not None:
            return inner.group(1), units.canonical(f"{inner.group(2)}/{found.group(2)}{found.group(3)}")
        return found.group(1), units.canonical(found.group(2) + found.group(3))
    found = _WORD_UNIT.fullmatch(text)
    if found is not None:
        body, space, word, power = found.groups()
        first = re.split(r"[\s/]", word)[0]
        # m behind a number is a variable, unless a space parts them
        if (units.is_known(first) and (space or len(first) > 1)) or (space and len(first) > 2):
            return body, units.canonical(word + power)
    return text, ""


_INTEGER = r"\d+"
_GROUPED = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+"
_DECIMAL = rf"(?:{_GROUPED}|{_INTEGER})(?:\.\d*)?|\.\d+"
_PLAIN = re.compile(rf"([-+]?)\s*({_DECIMAL})")
_SCIENTIFIC = re.compile(
    rf"([-+]?)\s*(?:(?:({_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*(?:\{{\s*([-+]?\d+)\s*\}}|([-+]?\d+))"
    rf"|({_DECIMAL})[eE]([-+]?\d+))"
)
_FRACTION = re.compile(
    rf"([-+]?)\s*(?:({_INTEGER})\s*)?\\frac\s*(?:\{{\s*([-+]?)\s*({_DECIMAL})\s*\}}|(\d))\s*"
    rf"(?:\{{\s*([-+]?)\s*({_DECIMAL})\s*\}}|(\d))"
)
_SLASHED = re.compile(rf"([-+]?)\s*(?:({_INTEGER})\s+)?\(?({_DECIMAL})\)?\s*/\s*\(?([-+]?)({_DECIMAL})\)?")
_RATIO = re.compile(rf"({_INTEGER})\s*:\s*({_INTEGER})")


def _number(text: str) -> tuple[Fraction, bool] | None:
    """A number's exact value and whether it has a decimal point; None for anything else."""
    text = text.strip().replace("{,}", ",")
    while text.startswith("{") and text.endswith("}") and _is_balanced(text[1:-1]):
        text = text[1:-1].strip()
    found = _PLAIN.fullmatch(text)
    if found is not None:
        return _signed(found.group(1), _fraction(found.group(2))), "." in text
    found = _SCIENTIFIC.fullmatch(text)
    if found is not None:
        sign, mantissa, braced, bare, mantissa_e, exponent_e = found.groups()
        power = int(braced or bare or exponent_e)
        if abs(power) > MOST_DIGITS:
            return None
        value = _fraction(mantissa or mantissa_e or "1") * Fraction(10) ** power
        return _signed(sign, value), "." in text
    return _quotient(text)


def _quotient(text: str) -> tuple[Fraction, bool] | None:
    found = _RATIO.fullmatch(text)
    if found is not None:
        sign, whole, top_sign, top, bottom_sign, bottom = "", None, "", found.group(1), "", found.group(2)
    elif (found := _FRACTION.fullmatch(text)) is not None:
        sign, whole, top_sign, top, top_digit, bottom_sign, bottom, bottom_digit = found.groups()
        top, bottom = top or top_digit, bottom or bottom_digit
    elif (found := _SLASHED.fullmatch(text)) is not None:
        sign, whole, top, bottom_sign, bottom = found.groups()
        top_sign = ""
    else:
        return None
    divisor = _fraction(bottom)
    if divisor == 0:
        raise UnreadableError("a division by zero")
    if whole and (top_sign or bottom_sign):
        return None
    value = _signed(top_sign or "", _fraction(top)) / _signed(bottom_sign or "", divisor)
    return _signed(sign, int(whole or 0) + value), "." in text


def _fraction(digits: str) -> Fraction:
    digits = digits.replace(",", "").replace(" ", "")
    return Fraction(digits + "0" if digits.endswith(".") else digits)


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _parse(text: str) -> Any:
    """What latex2sympy makes of a formula."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex
    from sympy import Basic, MatrixBase

    settings = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        normalised = normalize_latex(text, config=settings)
        expr = latex2sympy(
            normalised,
            is_real=not should_treat_as_complex(normalised),
            convert_degrees=False,
            normalization_config=None,
        )
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableError(f"{type(error).__name__}: {error}"[:200]) from None
    if not isinstance(expr, Basic | MatrixBase):
        raise UnreadableError(f"no formula but {type(expr).__name__}")
    return expr


def _split(text: str, separator: str) -> list[str]:
    """Split where `separator` matches outside of all brackets."""
    pattern = re.compile(separator)
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        found = pattern.match(text, i) if depth <= 0 else None
        if found is not None and found.end() > i:
            parts.append(text[start:i])
            start = i = found.end()
            continue
        if text.startswith(("\\begin", "\\end"), i):
            depth += 1 if text[i + 1] == "b" else -1
        if text[i] == "\\" and text[i + 1 : i + 2] not in "{}":
            i += 2
            continue
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[i], 0)
        i += 1
    return [*parts, text[start:]]


def _is_balanced(text: str) -> bool:
    """Whether no bracket in `text` is closed that was opened before it; the two kinds of an interval are alike."""
    depth, i = 0, 0
    while i < len(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[i], 0)
        if depth < 0:
            return False
        i += 1
    return depth == 0

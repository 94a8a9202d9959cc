r"""Answers as they are written, in one spelling: unicode, LaTeX spacing, synonyms of commands, stray dollar signs."""

from __future__ import annotations

import re
import unicodedata

_SYMBOLS = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": "/",
    "∕": "/",
    "⁄": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "√": r"\sqrt ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "±": r"\pm ",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "ℝ": r"\mathbb{R}",
    "\u200b": "",
    "\ufeff": "",
    "“": '"',
    "”": '"',
    "’": "'",
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")

# (pattern, replacement), in order
_SPELLINGS = [
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|large|Large|phantom\{[^{}]*\})(?![a-zA-Z])"), " "),
    (re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])"), ""),
    (re.compile(r"\\m?(?:left|right)\s*\."), ""),
    (re.compile(r"\\m?(?:left|right)(?![a-zA-Z])"), ""),
    # spaces; `\\` ends a row of a matrix
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|(?<!\\)\\,)(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\\hspace\{[^{}]*\}"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:leqslant|leq)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geqslant|geq)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}"), r"\\emptyset"),
    (
        re.compile(r"\\(?:mathrm|mathit|textrm|textit|textbf|textnormal|textsf|mbox|operatorname|bf|rm)\*?\s*\{"),
        r"\\text{",
    ),
    (re.compile(r"\\(?:mathbf|boldsymbol|bm|mathsf)\s*\{([^{}]*)\}"), r"{\1}"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degrees?(?![a-zA-Z])"), "°"),
    (re.compile(r"\\%|\\text\{\s*\\?%\s*\}|\\text\{\s*(?:percent|per cent)\s*\}"), "%"),
    (re.compile(r"(?<=[\d\s}])\s*\b(?:percent|per cent|pct)\b"), "%"),
    (re.compile(r"\\text\{\s*\}"), ""),
    (re.compile(r"\\text\{\s*(and|or)\s*\}"), r" \1 "),
    (re.compile(r"(?<![\\a-zA-Z])(pi|infty|theta|sqrt)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(?:infinity|oo|inf)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:ldots|dots|cdots)(?![a-zA-Z])"), r"\\ldots "),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\*\*"), "^"),
]
_DELIMITERS = [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"), ('"', '"')]
_SPACES = re.compile(r"\s+")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def normal_form(text: str) -> str:
    r"""One spelling of an answer: `$\dfrac{1}{2}$.` and `\frac{1}{2}` are the same afterwards.

    Digits of other scripts become ASCII, full stops at the end and delimiters of formulas go. Dollar signs that remain
    are currency.
    """
    text = _ascii(text)
    text = _without_delimiters(text)
    text = text.replace("\\$", "$")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _SPACES.sub(" ", text)
    return _without_delimiters(_without_outer_text(text))


def plain(text: str) -> str:
    r"""Words as they are read: `\text{Yes}.` is `yes`. For comparing texts and finding letters of choices."""
    text = _TEXT.sub(r" \1 ", normal_form(text))
    return _SPACES.sub(" ", text.replace("{", " ").replace("}", " ")).strip(" .,;:!").casefold()


def _ascii(text: str) -> str:
    if text.isascii():
        return text
    found: list[str] = []
    in_power = False
    for char in text:
        is_power = char in "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺"
        if is_power and not in_power:
            found.append("^{")
        if in_power and not is_power:
            found.append("}")
        in_power = is_power
        found.append(char.translate(_SUPERSCRIPTS) if is_power else _ascii_char(char))
    return "".join(found) + ("}" if in_power else "")


def _ascii_char(char: str) -> str:
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if unicodedata.category(char) == "Nd":
        return str(unicodedata.decimal(char))
    if unicodedata.category(char) == "No":
        # a half is 1/2; behind a number it is part of a mixed one
        written = unicodedata.normalize("NFKC", char).replace("⁄", "/")
        return f" {written}" if "/" in written else char
    if unicodedata.east_asian_width(char) == "F":
        return unicodedata.normalize("NFKC", char)
    return char


def _without_delimiters(text: str) -> str:
    """Without the marks of a formula, emphasis or quotation around all of it, and without a full stop at the end."""
    while True:
        text = text.strip()
        while text.endswith((".", ",", ";", "。")) and not text.endswith("\\,"):
            text = text[:-1].rstrip()
        for start, end in _DELIMITERS:
            inner = text[len(start) : -len(end)]
            # a second formula inside means that the marks do not belong together
            if len(text) > len(start + end) and text.startswith(start) and text.endswith(end) and start not in inner:
                text = inner
                break
        else:
            return _inner_dollars(text)


def _inner_dollars(text: str) -> str:
    """Formulas inside a text, `$1$ and $2$`, lose their dollar signs; a lone one is currency."""
    if text.count("$") % 2 == 0 and "$" in text and not re.search(r"\$\s*\d[\d.,]*\s*(?:[a-z]|,|$)", text):
        return text.replace("$", "")
    return text


def _without_outer_text(text: str) -> str:
    text = text.strip()
    match = _TEXT.fullmatch(text)
    return match.group(1) if match else text

"""Units of measure and currencies: which spellings are one unit, and which units convert into each other."""

from __future__ import annotations

import re
from fractions import Fraction

# unit: (what it measures, its size in the measure's base unit, spellings)
_TABLE: dict[str, tuple[str, str, str]] = {
    "mm": ("length", "0.001", "millimeter millimetre"),
    "cm": ("length", "0.01", "centimeter centimetre"),
    "dm": ("length", "0.1", "decimeter decimetre"),
    "m": ("length", "1", "meter metre"),
    "km": ("length", "1000", "kilometer kilometre kms"),
    "in": ("length", "0.0254", "inch inches"),
    "ft": ("length", "0.3048", "foot feet"),
    "yd": ("length", "0.9144", "yard"),
    "mi": ("length", "1609.344", "mile"),
    "mg": ("mass", "0.000001", "milligram"),
    "g": ("mass", "0.001", "gram"),
    "kg": ("mass", "1", "kilogram kgs"),
    "oz": ("mass", "0.028349523125", "ounce"),
    "lb": ("mass", "0.45359237", "pound lbs"),
    "ton": ("mass", "1000", "tonne"),
    "ms": ("time", "0.001", "millisecond"),
    "s": ("time", "1", "second sec secs"),
    "min": ("time", "60", "minute mins"),
    "h": ("time", "3600", "hour hr hrs"),
    "day": ("time", "86400", ""),
    "week": ("time", "604800", ""),
    "ml": ("volume", "0.001", "milliliter millilitre"),
    "l": ("volume", "1", "liter litre"),
    "$": ("usd", "1", "dollar usd us$"),
    "cent": ("usd", "0.01", "¢"),
    "€": ("eur", "1", "euro eur"),
    "£": ("gbp", "1", "gbp"),
    "¥": ("jpy", "1", "yen jpy"),
    "₹": ("inr", "1", "rupee rs inr"),
    "°": ("angle", "1", "degree deg"),
    "rad": ("radian", "1", "radian"),
    "month": ("month", "1", ""),
    "year": ("month", "12", "yr yrs"),
    "n": ("force", "1", "newton"),
    "j": ("energy", "1", "joule"),
    "w": ("power", "1", "watt"),
    "hz": ("frequency", "1", "hertz"),
    "mph": ("mph", "1", ""),
}
_NAMES = {
    spelling: unit
    for unit, (_, _, spellings) in _TABLE.items()
    for name in (unit, *spellings.split())
    for spelling in ((name, f"{name}s") if len(name) > 3 or name in ("day", "yard", "mile") else (name,))
}
CURRENCIES = "$€£¥₹"
_POWER_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_PART = re.compile(r"(.+?)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?")


def is_known(word: str) -> bool:
    """Whether `word` is a unit of the table, in any spelling."""
    return word.casefold().rstrip(".") in _NAMES


def canonical(unit: str) -> str:
    """One spelling of a unit: `square centimeters`, `cm^2` and `cm^{2}` are `cm^2`; unknown words lose a plural s."""
    text = re.sub(r"\bper\b", "/", unit.casefold().replace("\\", " ").replace("²", "^2").replace("³", "^3"))
    return "/".join(_canonical_part(part) for part in text.split("/"))


def _canonical_part(part: str) -> str:
    words = part.replace(".", " ").split()
    power = 1
    for word in [word for word in words if word in _POWER_WORDS]:
        power = _POWER_WORDS[word]
        words.remove(word)
    match = _PART.fullmatch(" ".join(words))
    if match is None:
        return ""
    name = match.group(1)
    power = int(match.group(2) or power)
    name = _NAMES.get(name) or (name[:-1] if name.endswith("s") and len(name) > 3 else name)
    return name if power == 1 else f"{name}^{power}"


def conversion(unit: str, other: str) -> Fraction | None:
    """How many `other` one `unit` is, both canonical; None if they measure different things or are not known."""
    if unit == other:
        return Fraction(1)
    ours, theirs = unit.split("/"), other.split("/")
    if len(ours) != len(theirs):
        return None
    factor = Fraction(1)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        part = _part_conversion(a, b)
        if part is None:
            return None
        factor = factor / part if i else factor * part
    return factor


def _part_conversion(a: str, b: str) -> Fraction | None:
    (name, _, power), (other, _, other_power) = a.partition("^"), b.partition("^")
    if a == b:
        return Fraction(1)
    if power != other_power or name not in _TABLE or other not in _TABLE or _TABLE[name][0] != _TABLE[other][0]:
        return None
    ratio = Fraction(_TABLE[name][1]) / Fraction(_TABLE[other][1])
    return Fraction(ratio ** int(power or 1))

"""Words of a text with the language of each, for text in several languages and scripts.

* A word is a run of letters and marks of one script, with apostrophes and hyphens within. Where a script does not
  separate words, so many characters are one word, begun ones included: Chinese characters and kana 2, Thai, Lao, Khmer
  and Burmese letters 4. These are about the lengths of words in running text.
* No words are: what holds a digit or an underscore; single Latin or Greek letters; identifiers (`isPrime`);
  abbreviations in capitals of up to five letters; letters of mathematical alphabets; and names. A name is a word with a
  capital that is not the first of its sentence, or is followed there by another script; in German text nouns cannot be
  told from names, so if German is asked for all such words count. A word that `stop_words` lists is never a name.
* The script tells the language where one language alone of those below has it. Chinese characters are Japanese in a
  sentence with kana (two, or a fifth of it); a sentence of up to six of them without kana may be either.
* Among languages of one script the words of a clause have one language: that asked for, unless another has more
  evidence, in a fifth of the words or more: listed words, and words with a letter that it has and ASCII has not. A
  clause without evidence is in the language of the one before it in its sentence, or else in that asked for.

It cannot tell languages of one script that are not listed, traditional from simplified characters, a single foreign
word in a clause of the same script, or romanised text from other Latin text.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import regex

from grpo_fast.rewards.stop_words import LETTERS, STOP_WORDS

SCRIPTS: Final[dict[str, str]] = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "pl", "tr", "vi", "id"), "LATIN"),
    **dict.fromkeys(("ru", "uk", "bg"), "CYRILLIC"),
    **dict.fromkeys(("ar", "fa", "ur"), "ARABIC"),
    "zh": "CJK",
    "ja": "KANA",
    "ko": "HANGUL",
    "th": "THAI",
    "lo": "LAO",
    "km": "KHMER",
    "my": "MYANMAR",
    "el": "GREEK",
    "he": "HEBREW",
    "hi": "DEVANAGARI",
    "bn": "BENGALI",
    "ta": "TAMIL",
    "te": "TELUGU",
    "ka": "GEORGIAN",
    "hy": "ARMENIAN",
    "am": "ETHIOPIC",
}
NAMES: Final[dict[str, str]] = {
    "english": "en",
    "german": "de",
    "french": "fr",
    "spanish": "es",
    "italian": "it",
    "portuguese": "pt",
    "dutch": "nl",
    "swedish": "sv",
    "danish": "da",
    "norwegian": "no",
    "polish": "pl",
    "turkish": "tr",
    "vietnamese": "vi",
    "indonesian": "id",
    "russian": "ru",
    "ukrainian": "uk",
    "bulgarian": "bg",
    "arabic": "ar",
    "persian": "fa",
    "urdu": "ur",
    "chinese": "zh",
    "japanese": "ja",
    "korean": "ko",
    "thai": "th",
    "greek": "el",
    "hebrew": "he",
    "hindi": "hi",
    "bengali": "bn",
    "tamil": "ta",
    "telugu": "te",
    "nb": "no",
    "nn": "no",
}
# of one word; kana and Chinese characters mix within words
CHARACTERS_PER_WORD: Final = {"CJK": 2, "THAI": 4, "LAO": 4, "KHMER": 4, "MYANMAR": 4}
# evidence against the language asked for must be found in this share of a clause's words
EVIDENCE: Final = 0.2
# Chinese characters of a sentence that may be Japanese without kana
SHORT: Final = 6
LONGEST_ABBREVIATION: Final = 5
# longer runs of letters are words, but nothing is looked up for them
LONGEST_WORD: Final = 64

_UNSEPARATED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TOKEN = regex.compile(
    rf"""(?P<east>[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}ー]+)
    | (?P<south>[\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{Myanmar}}]+)
    | (?P<word>[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSEPARATED}]]+
        (?:['’ʼ‐-][[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSEPARATED}]]+)*)
    | (?P<stop>[.!?\n\r\x85\u2028\u2029。｡！？…؟۔।॥]+)
    | (?P<pause>[,;:()\[\]"«»“”„—–、，；：「」『』（）،؛])""",
    regex.VERBOSE | regex.VERSION1,
)
_FORMAT_CHARACTERS = regex.compile(r"\p{Cf}+")
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
_HAN = regex.compile(r"\p{Han}")
_WIDE = {0xFF01 + i: 0x21 + i for i in range(0x5E)}
_LETTERS_ARE_VARIABLES = ("LATIN", "GREEK")
# first words of the names of letters that are of no script
_SYMBOLS = frozenset(
    (
        *("MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "MODIFIER", "SUPERSCRIPT", "SUBSCRIPT", "CIRCLED"),
        *("FEMININE", "MASCULINE", "KELVIN", "ANGSTROM", "OHM", "MICRO", "PLANCK", "EULER", "ALEF", "BET"),
        "INFORMATION",
    )
)
_KNOWN = frozenset[str]().union(*STOP_WORDS.values())
_BY_SCRIPT: Final = {
    script: tuple(code for code in STOP_WORDS if SCRIPTS[code] == script) for script in ("LATIN", "CYRILLIC", "ARABIC")
}


@dataclass(frozen=True, slots=True)
class _Word:
    """Letters of one script; `size` in words."""

    text: str
    script: str
    size: int = 1
    num_kana: int = 0
    num_han: int = 0


def language_code(name: str) -> str:
    """The code of a language given as "en", "en-US", "zh_Hans" or "English".

    Raises:
        ValueError: For one that is not among those that can be told.
    """
    base = name.strip().lower().replace("_", "-").partition("-")[0]
    code = NAMES.get(base, base)
    if code not in SCRIPTS:
        raise ValueError(f"language {name!r} is not one of {', '.join(sorted(SCRIPTS))}")
    return code


def count_words(text: str, language: str, *, ignored: Set[str] = frozenset()) -> tuple[int, int]:
    """How many words of a text are of a language, and how many words there are.

    Args:
        text: Prose, as `grpo_fast.rewards.prose` leaves it.
        language: A code of `SCRIPTS`.
        ignored: Words that do not count, in lower case.
    """
    target = total = 0
    for sentence in _sentences(text):
        kept = [
            [word for word in clause if word and word.text.lower() not in ignored]
            for clause in _without_names(sentence, language)
        ]
        is_japanese = _is_japanese([word for clause in kept for word in clause])
        num_han = sum(word.num_han for clause in kept for word in clause)
        before = language
        for clause in kept:
            before = _clause_language(clause, language, before)
            for word in clause:
                total += word.size
                target += _size_in(word, language, before, is_japanese=is_japanese, num_han=num_han)
    return target, total


def language_of(text: str) -> str | None:
    """The language that most words of a text are in; None if there are no words or no evidence.

    Args:
        text: Prose.
    """
    scripts: Counter[str] = Counter()
    evidence: Counter[str] = Counter()
    for sentence in _sentences(text):
        words = [word for clause in sentence for word in clause]
        is_japanese = _is_japanese(words)
        for word in words:
            east = "KANA" if is_japanese else "CJK"
            scripts[east if word.script == "CJK" else word.script] += word.size
            evidence.update(_evidence(word.text, word.script))
    if not scripts:
        return None
    script = max(scripts, key=lambda name: scripts[name])
    codes = [code for code, of in SCRIPTS.items() if of == script]
    if script not in _BY_SCRIPT:
        return codes[0] if codes else None
    (best, most), (_, second) = Counter({code: evidence[code] for code in codes}).most_common(2)
    return best if most > second else None


def _sentences(text: str) -> Iterator[list[list[_Word]]]:
    """The clauses of each sentence, and their words."""
    text = _FORMAT_CHARACTERS.sub("", text).translate(_WIDE)
    sentence: list[list[_Word]] = [[]]
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "stop":
            yield sentence
            sentence = [[]]
        elif kind == "pause":
            sentence.append([])
        else:
            word = _word(token) if kind == "word" else _unseparated(token)
            if word is not None:
                sentence[-1].append(word)
    yield sentence


def _unseparated(token: str) -> _Word:
    script = _script(token[0])
    script = "CJK" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else script
    per_word = CHARACTERS_PER_WORD.get(script, 2)
    if script == "CJK":
        num_kana, num_han = len(_KANA.findall(token)), len(_HAN.findall(token))
        return _Word(token, script, -(-len(token) // per_word), num_kana, num_han)
    num_letters = sum(unicodedata.category(character)[0] == "L" for character in token)
    return _Word(token, script, max(1, -(-num_letters // per_word)))


def _word(token: str) -> _Word | None:
    if len(token) > LONGEST_WORD:
        # one that is all of one script, or of none
        return _Word("", _script_of(token[:LONGEST_WORD]))
    return _short_word(token)


@functools.lru_cache(maxsize=65536)
def _short_word(token: str) -> _Word | None:
    letters = [character for character in token if character.isalpha()]
    if not letters or "_" in token or any(unicodedata.category(character)[0] == "N" for character in token):
        return None
    script = _script_of(token)
    if not script or (len(letters) == 1 and script in _LETTERS_ARE_VARIABLES):
        return None
    is_upper = all(character.isupper() for character in letters)
    is_known = token.lower() in _KNOWN
    if is_upper and not is_known and 2 <= len(letters) <= LONGEST_ABBREVIATION:
        return None
    if not is_upper and any(low.islower() and high.isupper() for low, high in pairwise(token)):
        return None
    return _Word(unicodedata.normalize("NFC", token).replace("’", "'").replace("ʼ", "'"), script)


def _script_of(token: str) -> str:
    """The script of a token's letters, MIXED for several, and '' for symbols only."""
    scripts = {_script(character) for character in token if character.isalpha()} - _SYMBOLS
    return (scripts.pop() if len(scripts) == 1 else "MIXED") if scripts else ""


@functools.lru_cache(maxsize=65536)
def _script(character: str) -> str:
    name = unicodedata.name(character, "").split(" ")[0]
    return "CJK" if name in ("IDEOGRAPHIC", "VERTICAL") else name


def _without_names(sentence: list[list[_Word]], language: str) -> list[list[_Word | None]]:
    words = [word for clause in sentence for word in clause]
    followers = iter([*words[1:], None])
    is_first, kept = True, []
    for clause in sentence:
        row: list[_Word | None] = []
        for word in clause:
            following = next(followers)
            is_opening = is_first and following is not None and following.script == word.script
            is_first = False
            row.append(None if language != "de" and not is_opening and _may_be_name(word) else word)
        kept.append(row)
    return kept


def _may_be_name(word: _Word) -> bool:
    return word.text[:1].isupper() and not word.text.isupper() and word.text.lower() not in _KNOWN


def _is_japanese(words: list[_Word]) -> bool:
    num_kana, num_han = sum(word.num_kana for word in words), sum(word.num_han for word in words)
    return num_kana >= 2 or num_kana * 5 >= num_kana + num_han > 0


def _clause_language(clause: list[_Word], language: str, before: str) -> str:
    """The language of a clause's words in the script of `language`; `before` is that of the clause before it."""
    script = SCRIPTS[language]
    words = [word for word in clause if word.script == script]
    if script not in _BY_SCRIPT or not words:
        return before
    evidence = Counter(code for word in words for code in _evidence(word.text, script))
    if not evidence:
        return before
    best, most = evidence.most_common(1)[0]
    if most > evidence[language] and most >= EVIDENCE * len(words):
        return best
    return language


@functools.lru_cache(maxsize=65536)
def _evidence(text: str, script: str) -> tuple[str, ...]:
    """The languages that a word may be of: those that list it, or if none does, those that have its letters."""
    lower = text.lower()
    codes = _BY_SCRIPT.get(script, ())
    listed = tuple(code for code in codes if lower in STOP_WORDS[code])
    if listed:
        return listed
    special = {character for character in lower if any(character in LETTERS.get(code, "") for code in codes)}
    return tuple(code for code in codes if special and special <= set(LETTERS.get(code, "")))


def _size_in(word: _Word, language: str, clause: str, *, is_japanese: bool, num_han: int) -> int:
    """How many of the words that `word` stands for are of the language."""
    if word.script == "CJK":
        per_word = CHARACTERS_PER_WORD["CJK"]
        if language == "zh":
            return 0 if is_japanese else min(word.size, -(-word.num_han // per_word))
        if language == "ja":
            return word.size if is_japanese or num_han <= SHORT else -(-word.num_kana // per_word)
        return 0
    return word.size if word.script == SCRIPTS[language] and clause == language else 0

"""From MediaWiki markup to lines of prose.

``gensim.corpora.wikicorpus.filter_wiki`` removes every template, formula and file link, which
leaves holes in sentences ("stretches over  into the Pacific Ocean") and pastes captions onto
paragraphs. So what carries text is written out before it, and what carries none is taken out
whole; after it, only the left-overs of emphasis, list marks and emptied parentheses remain.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

MIN_LINE_CHARACTERS = 120
"""Lines of this many characters or fewer are headings, captions, table cells: dropped."""

# filter_wiki takes everything between "<" and the next ">" for a tag, over several lines, so a
# bare comparison sign in prose would swallow sentences. It travels as a private-use character.
_LESS, _GREATER = "\ue000", "\ue001"
# Stands where a formula or an unknown measure was: a line holding it has lost content.
_HOLE = "\ue002"

_BACK_MATTER = re.compile(
    r"^==\s*(see also|references?|notes?|notes and references|references and notes|footnotes"
    r"|citations|sources|bibliography|selected bibliography|works cited|further reading"
    r"|external links|publications|literature)\s*==\s*$.*",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_REMOVED_WHOLE = (
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"<ref\b[^<>]*/>", re.IGNORECASE),
    re.compile(r"<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE),
    re.compile(r"<(gallery|source|timeline|imagemap)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.I),
)
_FORMULA = re.compile(r"<math\b[^<>]*>.*?</math\s*>", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[(?!\s*(?:file|image|category)\s*:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", re.I)
_FILE = re.compile(r"\[\[\s*(?:file|image)\s*:[^\[\]]*\]\]", re.IGNORECASE)
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_NAMED = re.compile(r"^\s*(\w[\w -]*?)\s*=")

_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_UNITS = {
    "sqkm": "km²", "km2": "km²", "sqmi": "sq mi", "mi2": "sq mi", "m2": "m²", "sqft": "sq ft",
    "m3": "m³", "km3": "km³", "cuft": "cu ft", "C": "°C", "F": "°F", "C-change": "°C",
    "F-change": "°F", "lb/cuft": "lb/cu ft", "nmi": "nautical miles", "mi": "miles",
    "ft": "feet", "in": "inches", "acre": "acres",
}  # fmt: skip
_DASH = "\u2013"
_RANGES = {
    "to": " to ", "-": _DASH, _DASH: _DASH, "and": " and ", "or": " or ", "by": " by ",
    "x": " by ",
}  # fmt: skip

Arguments = list[str]


def _convert(given: Arguments) -> str:
    """Write {{convert|60|to|65|mi|km}} as "60 to 65 miles"."""
    words = [given[0]]
    rest = given[1:]
    while len(rest) >= 2 and rest[0] in _RANGES:
        words += [_RANGES[rest[0]], rest[1]]
        rest = rest[2:]
    unit = rest[0] if rest else ""
    return f"{''.join(words)} {_UNITS.get(unit, unit)}".strip()


def _as_of(given: Arguments) -> str:
    """Write {{as of|2015|6|30}} as "As of June 2015"."""
    month = ""
    if len(given) > 1 and given[1].isdigit() and 1 <= int(given[1]) <= 12:
        month = _MONTHS[int(given[1]) - 1] + " "
    return f"As of {month}{given[0]}"


def _nihongo(given: Arguments) -> str:
    """Write {{nihongo|English|kanji|romaji}} as a reader sees it."""
    english, kanji, romaji = (*given, "", "", "")[:3]
    head = english or romaji
    inside = ", ".join(part for part in (kanji, romaji) if part and part != head)
    return f"{head} ({inside})" if head and inside else head or kanji


def _fraction(given: Arguments) -> str:
    """Write {{frac|3|1|2}} as "3 1/2"."""
    if len(given) == 1:
        return f"1/{given[0]}"
    return " ".join([*given[:-2], f"{given[-2]}/{given[-1]}"])


def _first(given: Arguments) -> str:
    return given[0]


def _last(given: Arguments) -> str:
    return given[-1]


def _joined(given: Arguments) -> str:
    return "".join(given)


_FIRST = (
    "nowrap", "nobr", "sc", "smaller", "small", "big", "large", "angbr", "linktext", "vr", "sup",
    "sub", "midsize", "unicode", "quote", "cquote", "quotation", "bquote", "blockquote", "ipa",
    "music", "railgauge", "formatnum", "center", "abbr", "smallcaps",
)  # fmt: skip
_CONSTANT = {
    "'s": "'s", "=": "=", "!": "|", "mdash": "\u2014", "mdashb": "\u2014", "ndash": _DASH,
    "snd": f" {_DASH} ", "spaced ndash": f" {_DASH} ", "nbsp": " ", "spaces": " ", "dot": " · ",
    "'": "'", "circa": "c. ", "' \"": "'\"", "-\"": "\"",
}  # fmt: skip
_WRITTEN: dict[str, Callable[[Arguments], str]] = {
    **dict.fromkeys(_FIRST, _first),
    "convert": _convert,
    "cvt": _convert,
    "as of": _as_of,
    "nihongo": _nihongo,
    "frac": _fraction,
    "fraction": _fraction,
    "sfrac": _fraction,
    "chem": _joined,
    "lang": _last,
    "transl": _last,
    "rtl-lang": _last,
    "resize": _last,
    "oldstyledate": lambda given: ", ".join(given[:2]),
    "c.": lambda given: f"c. {given[0]}",
    "uss": lambda given: f"USS {given[0]}",
    "hms": lambda given: f"HMS {given[0]}",
    "bibleref": lambda given: " ".join(given[:2]),
}
# Numbers that cannot be written out without computing them: the sentence is broken without.
_BROKEN = {"val", "e", "inflation", "currentyear", "coord", "ra", "math"}


def _template(match: re.Match[str]) -> str:
    name, *given = match[1].split("|")
    name = name.strip().lower()
    if name in _CONSTANT:
        return _CONSTANT[name]
    if name in _BROKEN:
        return _HOLE
    values = []
    for argument in given:
        named = _NAMED.match(argument)
        if named is None or named[1] in {"1", "2", "text"}:
            values.append(argument.split("=", 1)[1].strip() if named else argument.strip())
    if name.startswith("lang-"):
        return values[0] if values else ""
    writer = _WRITTEN.get(name)
    return writer(values) if writer and values else ""


def _repeat(pattern: re.Pattern[str], by: str | Callable[[re.Match[str]], str], text: str) -> str:
    """Substitute innermost first until nothing is left: the markup nests."""
    while True:
        text, count = pattern.subn(by, text)
        if not count:
            return text


def write_out(raw: str) -> str:
    """Replace the markup that carries text by that text, and remove what carries none.

    ``raw`` is one article's wikitext; the result still goes through gensim's ``filter_wiki``.
    """
    text = raw
    for pattern in _REMOVED_WHOLE:
        text = pattern.sub("", text)
    text = _BACK_MATTER.sub("", text)
    text = _FORMULA.sub(_HOLE, text)
    text = _BREAK.sub("\n", text)
    text = html.unescape(_TAG.sub("", text))
    text = _repeat(_LINK, r"\1", text)
    text = _repeat(_TEMPLATE, _template, text)
    text = _FILE.sub("", text)
    text = _repeat(_TABLE, "", text)
    return text.replace("<", _LESS).replace(">", _GREATER)


_POSSESSIVE = re.compile(r"(?<!')''(?!')([^'\n]+)'''s\b")
_EMPHASIS = re.compile(r"'{2,}")
_LIST_MARK = re.compile(r"^[*#:;\s]+")
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff\ufffd]")
_SPACE = re.compile(r"[^\S\n]+")
_URL = re.compile(r"\(?\b(?:https?://|www\.)\S+")
_EMPTY_PARENTHESES = re.compile(r"(?<=\s)\((?:[\s,;:.\u2013\u2014/-]|\bor\b|\band\b)*\)")
_PARENTHESIS_START = re.compile(r"\((?:\s+|[,;:]\s+|[,;:](?=[,;:)]))+")
_PARENTHESIS_END = re.compile(r"(?:\s*[,;:])*\s+\)|(?:\s*[,;:])+\)")
_REPEATED_MARK = re.compile(r"([,;])(?:\s*[,;])+")
_SPACED_DOTS = re.compile(r"(?<=\S) ?\. \. \.(?: \.)?")
_SPACE_BEFORE_MARK = re.compile(r" +([,.;:])(?=\s|$)")
_EMPTY_QUOTES = re.compile(r"(?<=\s)(?:\"\s*\"|“\s*”)(?=[\s,.;])")
_RESIDUE = re.compile(
    r"[{}|\ue002]|\[\[|\]\]|(?:file|image|category):\S|\b(?:colspan|rowspan)=", re.I
)
_CITATION = re.compile(r"\b(?:ISBN|ISSN|OCLC|LCCN|doi:|arXiv:|PMID|Retrieved (?:on )?\w+ \d)")


def clean_line(line: str) -> str:
    """Remove the markup left in one line of ``filter_wiki``'s output; "" when it is not prose."""
    text = line.replace(_LESS, "<").replace(_GREATER, ">")
    if _RESIDUE.search(text) or _CITATION.search(text):
        return ""
    text = _SPACE.sub(" ", _INVISIBLE.sub("", text))
    text = _EMPHASIS.sub("", _POSSESSIVE.sub(r"\1's", text))
    text = _LIST_MARK.sub("", text)
    text = _URL.sub("", text)
    text = _EMPTY_PARENTHESES.sub("", text)
    text = _PARENTHESIS_START.sub("(", text)
    text = _PARENTHESIS_END.sub(")", text)
    text = _EMPTY_PARENTHESES.sub("", text)
    text = _EMPTY_QUOTES.sub("", text)
    text = _SPACED_DOTS.sub("...", text)
    text = _SPACE_BEFORE_MARK.sub(r"\1", text)
    text = _REPEATED_MARK.sub(r"\1", text)
    return _SPACE.sub(" ", text).strip()


def prose(raw: str, filter_wiki: Callable[[str], str]) -> str:
    """Turn one article's wikitext into its paragraphs, one a line.

    ``filter_wiki`` is gensim's, passed in so that this file stays free of the import (1 s).
    """
    lines = (clean_line(line) for line in filter_wiki(write_out(raw)).split("\n"))
    return "\n".join(line for line in lines if len(line) > MIN_LINE_CHARACTERS)

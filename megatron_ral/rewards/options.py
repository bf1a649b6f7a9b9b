"""Options of a multiple choice: which of them a text names, by letter, by content, or several at once."""

import re
import unicodedata
from typing import Optional, Sequence

from megatron_ral.rewards.reading import bare_number, choice_and_text, letter_and_rest, number, plain

MAX_LIST_LENGTH = 300
"""Characters of the longest text that is read as a list of letters."""
_LETTER = r"[(\[]?([A-Za-z])[)\]]?[.:)]?"
_LONE_LETTER = re.compile(_LETTER)
_LETTERS = re.compile(r"[A-Z]{2,26}|[a-z]{2,26}")
_LIST_START = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:answers?|options?|choices?)\b\s*(?:are\b|is\b)?\s*:?\s*|both\s+", re.IGNORECASE
)
_BETWEEN = re.compile(r"\s*[,;/&+、，\n]\s*(?:and\s+)?|\s+and\s+|(?<=[)\]])\s*(?=[(\[])", re.IGNORECASE)
_PART = re.compile(r"\s*(?:[,;/&\n]|\b(?:and|or)\b)\s*")
_LETTER_LAST = re.compile(r"(.*\S)\s*[(\[]([A-Za-z])[)\]]", re.DOTALL)
_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):]\)?[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def option_letter(answer: str, options: Sequence[str]) -> Optional[str]:
    """Return the letter of the option that an answer names, or None.

    An answer may name it by letter (`B`, `(b)`, `B.`), by text, or by both. A letter goes before an option that
    consists of this letter.
    """
    letters = _letters_of(options)
    texts = _bare_texts(options)
    named = _LONE_LETTER.fullmatch(answer.strip())
    if named and named[1].upper() in letters:
        return named[1].upper()
    whole = answer.strip().casefold()
    for letter, option, text in zip(letters, options, texts):
        if whole in (text, option.strip().casefold()):
            return letter
    return None


def chosen_options(text: str, options: Sequence[str] = (), is_list: bool = False) -> Optional[frozenset[str]]:
    """Return the letters of the options that a text chooses, upper case, or None.

    A letter and the content of another option, alone or among others, choose nothing ("B. blue" and "B. red or blue"
    where B is red). Options of equal content count as the first of them. A number names the only option that is this
    number ("1,000" where B is 1000 or 1000 m).

    Args:
        text: Answer or reference answer.
        options: Contents of the options in the order of their letters; empty where they are not known.
        is_list: Reading of "A. C" as two letters rather than as the letter A and its content.
    """
    text = unicodedata.normalize("NFKC", plain(text)).strip()
    one, several = (lambda: _one_option(text, options)), (lambda: _several_options(text, options))
    for read in (several, one) if is_list else (one, several):
        letters = read()
        if letters is not None:
            return letters
    return None


def reference_options(reference: str, options: Sequence[str] = ()) -> Optional[frozenset[str]]:
    """Return the letters of the options that a reference answer names, or None if it is a text of its own.

    Several letters are a list with marks or words between them ("A, C", "A and C", "(A)(C)"), or upper case in the
    order of the alphabet ("AC").
    """
    letters, bare = chosen_options(reference, options), plain(reference)
    if letters is None or (len(letters) > 1 and bare.isalpha() and bare != "".join(sorted(letters))):
        return None
    return letters


def options_in_question(question: str) -> tuple[str, ...]:
    """Return the contents of the options that stand in a question, each on a line of its own ("A. red"); empty: none.

    The letters have to be A, B, C and so on without a gap, and each may stand once.
    """
    found = _LINE.findall(question)
    letters = [letter for letter, _ in found]
    return tuple(text for _, text in found) if len(found) > 1 and letters == _letters_of(letters) else ()


def _letters_of(options: Sequence[str]) -> list[str]:
    return [chr(ord("A") + number) for number in range(len(options))]


def _bare_texts(options: Sequence[str]) -> list[str]:
    """Return the contents of options in lower case, without letters of their own ("B. red")."""
    return [
        re.sub(rf"^\(?{letter}[.):]\)?\s*", "", option.strip()).strip().casefold()
        for letter, option in zip(_letters_of(options), options)
    ]


def _one_option(text: str, options: Sequence[str]) -> Optional[frozenset[str]]:
    if not options:
        found = choice_and_text(text)
        return frozenset(found[0]) if found else None
    letters, texts = _letters_of(options), [comparable(text) for text in _bare_texts(options)]
    named = option_letter(text, options) or _by_content(text, letters, texts) or _by_letter(text, letters, texts)
    return frozenset(letters[texts.index(texts[letters.index(named)])]) if named else None


def _by_content(text: str, letters: list[str], texts: list[str]) -> Optional[str]:
    """Return the letter of the option whose content a text is, or that is the same number, or None."""
    spoken = _LIST_START.match(text)
    for content in (comparable(text), comparable(text[spoken.end() :]) if spoken else ""):
        if content and content in texts:
            return letters[texts.index(content)]
    value = bare_number(text)
    equal = [letter for letter, content in zip(letters, texts) if value is not None and number(content) == value]
    return equal[0] if len(equal) == 1 else None


def _by_letter(text: str, letters: list[str], texts: list[str]) -> Optional[str]:
    """Return the letter that a text names beside the content of its option, or beside a text that names no other."""
    found, last = choice_and_text(text), _LETTER_LAST.fullmatch(text)
    spaced = None if found else re.fullmatch(r"([A-Za-z])\s+(.*)", text, re.DOTALL)
    beside = [(match[letter].upper(), match[rest]) for match, letter, rest in ((spaced, 1, 2), (last, 2, 1)) if match]
    for letter, content in (letter_and_rest(text) or ("", ""), *beside):
        if letter in letters and comparable(content) == texts[letters.index(letter)]:
            return letter
    if found is None or found[0] not in letters:
        return None
    for part in _PART.split(found[1]):
        lone = _LONE_LETTER.fullmatch(part)
        if comparable(part) in texts or (lone and lone[1].upper() in letters):
            return None
    return found[0]


def comparable(text: str) -> str:
    """Return a text without markup, marks at its end, case and repeated spaces."""
    return " ".join(plain(text).casefold().rstrip(".;:!, ").split())


def _several_options(text: str, options: Sequence[str]) -> Optional[frozenset[str]]:
    text = text.rstrip(".;:! \n")
    if len(text) > MAX_LIST_LENGTH:
        return None
    start = _LIST_START.match(text)
    text = text[start.end() :] if start else text
    letters = frozenset(_letters_of(options))
    if _LETTERS.fullmatch(text):
        found = frozenset(text.upper())
        return found if len(found) == len(text) and (not letters or found <= letters) else None
    parts = [part for part in _BETWEEN.split(text) if part]
    if len(parts) == 1:
        parts = text.split()  # "A C", "A. C."
        if not all(map(_LONE_LETTER.fullmatch, parts)):
            return None
    if len(parts) < 2:
        return None
    found = frozenset()
    for part in parts:
        lone = _LONE_LETTER.fullmatch(part)
        one = frozenset(lone[1].upper()) if lone else _one_option(part, options) if options else None
        if one is None or (letters and not one <= letters):
            return None
        found |= one
    return found

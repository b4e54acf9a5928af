"""Make texts of any script comparable: one form of every letter, words, and where a word may end.

Imports no torch. The Unicode name of a character says which script it belongs to; Python has no other table of that.
"""

import re
import unicodedata

# Written without spaces between words: nothing shows where one ends.
_UNSPACED = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "HENTAIGANA ", "BOPOMOFO ", "YI ", "TANGUT ", "NUSHU "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "TAI ", "NEW TAI LUE ", "JAVANESE ", "BALINESE "),
)
# One keyboard writes these straight, another one curly, or in another length.
_ALIKE = {
    **dict.fromkeys("‘’‚‛ʼ′´", "'"),  # noqa: RUF001
    **dict.fromkeys("“”„‟″", '"'),
    **dict.fromkeys("‐‑‒–—―−〜", "-"),  # noqa: RUF001
    **dict.fromkeys("・‧•∙⋅", "·"),
}
_OTHER_VALUE = ("<super>", "<sub>")  # 10² is not 102


def fold(text: str) -> str:
    """Return the text in small letters, with single spaces, and one form for equal characters.

    These are equal: a letter with an accent, in one character or two; full and half width; ligatures and their letters;
    the digits of all scripts; straight and curly quotes; long and short dashes. Characters that do not show are left
    out. Superscripts, fractions and symbols stay what they are.
    """
    text = unicodedata.normalize("NFC", "".join(map(_one_form, unicodedata.normalize("NFC", text))))
    small = text.casefold().replace("i\u0307", "i")  # a Turkish capital I keeps its dot
    return " ".join(unicodedata.normalize("NFC", small).split())


def without_gaps(folded: str) -> str:
    """Return the text without spaces beside letters of scripts that need none. 一 二 stay two numbers."""

    def closed(match: re.Match[str]) -> str:
        beside = [is_unspaced(letter) for letter in match.groups()]
        two_numbers = all(beside) and match[1].isnumeric() and match[2].isnumeric()
        return match[1] if any(beside) and not two_numbers else match[0]

    return re.sub(r"(\S) (?=(\S))", closed, folded)


def words(folded: str) -> list[str]:
    """Return the words. A letter of a script without spaces is one of its own, and so is a syllable of Hangul.

    Korean words end in particles, so that two forms of one are alike in their syllables only.
    """
    return [unit for word in folded.split() for unit in _units(word)]


def is_unspaced(letter: str) -> bool:
    """Return whether the letter is of a script that has no spaces between words."""
    return unicodedata.name(letter, "").startswith(_UNSPACED)


def may_begin(before: str, first: str) -> bool:
    """Return whether a phrase that begins with `first` is whole with `before` in front of it (empty: nothing is)."""
    if not before or not _is_of_word(before):
        return True
    if (before.isnumeric() and first.isnumeric()) or _is_mark(first):
        return False
    return is_unspaced(before) or is_unspaced(first) or _is_hangul(before) != _is_hangul(first)


def may_end(phrase: str, after: str) -> bool:
    """Return whether the phrase is whole with `after` behind it (empty: nothing is).

    A mark belongs to the letter before it, and a number goes on in every numeral. (A name such as 张三 does not.)
    """
    if not after or not _is_of_word(after):
        return True
    if (after.isnumeric() and re.sub("[.,]", "", phrase).isnumeric()) or _is_mark(after):
        return False
    last = phrase[-1]
    return is_unspaced(after) or is_unspaced(last) or _is_hangul(after) or _is_hangul(last)


def _one_form(letter: str) -> str:
    if letter in _ALIKE:
        return _ALIKE[letter]
    kind, made_of = unicodedata.category(letter), unicodedata.decomposition(letter)
    if kind == "Nd":
        return str(unicodedata.decimal(letter))
    if kind == "Cf" or unicodedata.name(letter, "").startswith("VARIATION SELECTOR"):
        return ""  # a soft hyphen, a direction, a place to break a line
    is_text = kind[0] in "LMPZ" or kind == "Nl"
    if made_of.startswith(("<wide>", "<narrow>")) or (is_text and not made_of.startswith(_OTHER_VALUE)):
        return "".join(_ALIKE.get(part, part) for part in unicodedata.normalize("NFKC", letter))
    return letter


def _units(word: str) -> list[str]:
    units: list[str] = []
    joins = False
    for letter in word:
        alone = is_unspaced(letter) or _is_hangul(letter)
        if units and (_is_mark(letter) or (joins and not alone)):
            units[-1] += letter
        else:
            units.append(letter)
            joins = not alone
    return units


def _is_of_word(letter: str) -> bool:
    return letter == "_" or unicodedata.category(letter)[0] in "LMN"


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter)[0] == "M"


def _is_hangul(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("HANGUL ")

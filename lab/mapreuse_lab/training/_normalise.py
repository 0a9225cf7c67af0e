"""Normalises transcripts: numbers, symbols and acronyms are written as they are spoken."""

import re
import unicodedata

from num2words import num2words

LANGUAGES = ("en", "fr", "es", "it", "ru")

_LATIN = "abcdefghijklmnopqrstuvwxyz"
_ALPHABETS = {
    "en": _LATIN,
    "fr": _LATIN + "àâæçèéêëîïôùûüÿœ",
    "es": _LATIN + "áéíñóúü",
    "it": _LATIN + "àèéìíòóùú",
    "ru": _LATIN + "абвгдежзийклмнопрстуфхцчшщъыьэюя",
}
_SYMBOLS = {
    "en": {"*": "star", "#": "pound", "&": "and", "%": "percent", "@": "at"},
    "fr": {"*": "étoile", "#": "dièse", "&": "et", "%": "pour cent", "@": "arobas"},
    "es": {"*": "asterisco", "#": "numeral", "&": "y", "%": "por ciento", "@": "arroba"},
    "it": {"*": "asterisco", "#": "cancelletto", "&": "e", "%": "per cento", "@": "chiocciola"},
    "ru": {"*": "звездочка", "#": "решетка", "&": "и", "%": "процентов", "@": "собака"},
}
_DOT = {"en": "dot", "fr": "point", "es": "punto", "it": "punto", "ru": "точка"}
# Other words of two to four capitals are spelled letter by letter.
_READ_AS_WORDS = {"SIP", "PIN", "ZAP", "NO", "OK", "MAIL", "INBOX"}

_BRACKETED = re.compile(r"\([^)]*\)|\[[^\]]*\]|<[^>]*>")
_INITIALS = re.compile(r"\b([^\W\d_])\.(?=[^\W\d_]\b|\s|$)")
_ACRONYM = re.compile(r"\b[A-Z]{2,4}\b")
_DOTTED = re.compile(r"(?<=[^\W_])\.(?=[^\W_])")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
_MAX_DIGITS = 15  # longer numbers are spelled digit by digit
# Groups of three digits are separated by a comma in English, by a point in the other languages.
_THOUSANDS = {
    language: re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{mark}\d{{3}})+(?![\d{mark}])")
    for language, mark in {"en": ",", "fr": "[.]", "es": "[.]", "it": "[.]", "ru": "[.]"}.items()
}


def alphabet(language: str) -> list[str]:
    """The characters in normalised text of a language: space, apostrophe and letters, sorted.

    >>> "".join(alphabet("en"))
    " 'abcdefghijklmnopqrstuvwxyz"
    """
    return sorted({" ", "'", *_ALPHABETS[language]})


def spell_number(number: str, language: str = "en") -> str:
    """The words of a number.

    Numbers of up to three digits, decimals and grouped numbers are read as a whole. Longer numbers, such as telephone
    extensions, are read digit by digit.

    >>> spell_number("162"), spell_number("1,000"), spell_number("1234")
    ('one hundred sixty-two', 'one thousand', 'one two three four')
    """
    grouped = _THOUSANDS[language].fullmatch(number) is not None
    digits = re.sub(r"\D", "", number)
    if len(digits) > _MAX_DIGITS or (number.isdigit() and len(number) > 3):
        return " ".join(num2words(int(digit), lang=language) for digit in digits)
    value = int(digits) if grouped or number.isdigit() else float(number.replace(",", "."))
    words = num2words(value, lang=language)
    return words.replace(" and ", " ") if language == "en" else words


def normalise(text: str, language: str = "en") -> str:
    """Text in lower-case letters, with apostrophes only inside words and single spaces.

    Text in brackets is removed. Digits and symbols become words, acronyms single letters. Letters that are not in the
    language's alphabet lose their accents (Russian ё becomes е). Other characters become spaces.

    >>> normalise("Press * or 12 for USB [beep].")
    'press star or twelve for u s b'
    """
    text = unicodedata.normalize("NFC", text).replace("’", "'").replace("\ufeff", "")
    text = _BRACKETED.sub(" ", text)
    text = _INITIALS.sub(r"\1 ", text)
    for symbol, word in _SYMBOLS[language].items():
        text = text.replace(symbol, f" {word} ")
    text = _THOUSANDS[language].sub(lambda match: f" {spell_number(match.group(), language)} ", text)
    text = _NUMBER.sub(lambda match: f" {spell_number(match.group(), language)} ", text)
    text = _DOTTED.sub(f" {_DOT[language]} ", text)
    if language == "en":
        text = re.sub(r"\b[Ww]{3}\b", "w w w", text)
        if not text.isupper() or len(text.split()) == 1:  # else the whole text is in capitals
            text = _ACRONYM.sub(lambda m: m.group() if m.group() in _READ_AS_WORDS else " ".join(m.group()), text)
    letters = "".join(_letter(character, _ALPHABETS[language]) for character in text.lower())
    return " ".join(re.sub(r"(?<![^\W\d_])'|'(?![^\W\d_])", " ", letters).split())


def _letter(character: str, letters: str) -> str:
    """The character if it is in the alphabet, else the character without its accent, else a space."""
    plain = unicodedata.normalize("NFKD", character)[0]
    known = {*letters, "'"}
    return character if character in known else plain if plain in known else " "

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
# Capitals that are read as a word; every other run of two to four capitals is read letter by letter.
_READ_AS_WORDS = {"SIP", "PIN", "ZAP", "NO", "OK", "MAIL", "INBOX"}

_BRACKETED = re.compile(r"\([^)]*\)|\[[^\]]*\]|<[^>]*>")
_INITIALS = re.compile(r"\b([^\W\d_])\.(?=[^\W\d_]\b|\s|$)")
_ACRONYM = re.compile(r"\b[A-Z]{2,4}\b")
_DOTTED = re.compile(r"(?<=[^\W_])\.(?=[^\W_])")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
_LONGEST_QUANTITY = 15  # digits: more are read one by one
# Between groups of three digits: a comma in English, elsewhere a point; either is a decimal sign in the other.
_THOUSANDS = {
    language: re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{mark}\d{{3}})+(?![\d{mark}])")
    for language, mark in {"en": ",", "fr": "[.]", "es": "[.]", "it": "[.]", "ru": "[.]"}.items()
}


def alphabet(language: str) -> list[str]:
    """The characters a recogniser of `language` writes: space, apostrophe and letters, sorted."""
    return sorted({" ", "'", *_ALPHABETS[language]})


def spell_number(number: str, language: str = "en") -> str:
    """Words of a number as a telephone voice reads it.

    Up to three digits and decimals are read as a quantity ("162": one hundred sixty two), as are numbers whose digits
    are grouped ("1,000" in English, "1.000" elsewhere: one thousand); longer runs of digits one by one, as extensions
    and passwords are ("1234": one two three four).

    Raises `NotImplementedError` (from num2words) for a language it does not speak.
    """
    grouped = _THOUSANDS[language].fullmatch(number) is not None
    digits = re.sub(r"\D", "", number)
    if len(digits) > _LONGEST_QUANTITY or (number.isdigit() and len(number) > 3):
        return " ".join(num2words(int(digit), lang=language) for digit in digits)
    value = int(digits) if grouped or number.isdigit() else float(number.replace(",", "."))
    words = num2words(value, lang=language)
    return words.replace(" and ", " ") if language == "en" else words


def normalise(text: str, language: str = "en") -> str:
    """Text as the recogniser writes it: lower-case letters, apostrophes inside words, single spaces.

    Notes in brackets are dropped, digits and symbols are spoken out in `language`, capitals that are read letter
    by letter are separated ("USB": u s b), letters foreign to the language lose their accents (Russian ё becomes
    е), and every other mark becomes a space. The result of nothing to say is "".
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
    """The character if the language writes it, else what it is without its accent, else a space."""
    plain = unicodedata.normalize("NFKD", character)[0]
    known = {*letters, "'"}
    return character if character in known else plain if plain in known else " "

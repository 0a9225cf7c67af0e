import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapreuse_lab.training import alphabet
from mapreuse_lab.training._normalise import LANGUAGES, normalise


@pytest.mark.parametrize(
    ("language", "written", "spoken"),
    [
        ("en", "Please press 1 to mute, 162 to exit.", "please press one to mute one hundred sixty two to exit"),
        ("en", "at least a 28.8 kilobit modem", "at least a twenty eight point eight kilobit modem"),
        ("en", "extension 1234", "extension one two three four"),
        ("en", "press * or #", "press star or pound"),
        ("en", "your party's 'first' name", "your party's first name"),
        ("en", "A.M. on the USB Radio", "a m on the u s b radio"),
        ("en", "THE CAT SAT IN LA", "the cat sat in la"),
        ("en", "IAX", "i a x"),
        ("en", "visit www.asterisk.org.", "visit w w w dot asterisk dot org"),
        ("en", "dash [-]", "dash"),
        ("en", "Call-Forward", "call forward"),
        ("en", "café", "cafe"),
        ("en", "[ascending tones]", ""),
        ("en", "1,234,001 of 1,000", "one million two hundred thirty four thousand one of one thousand"),
        ("en", "5,6 or 12,3456", "five point six or twelve point three four five six"),
        ("fr", "1.000 et 12,5", "mille et douze virgule cinq"),
        ("en", f"{'7' * 400}.5", " ".join(["seven"] * 400 + ["five"])),
        ("fr", "Échec: composez le 2 #", "échec composez le deux dièse"),
        ("es", "marque el 5 ahora", "marque el cinco ahora"),
        ("it", "Attivato. (You are now muted.)", "attivato"),
        ("ru", "Нажмите 1, затем решётку.", "нажмите один затем решетку"),
    ],
)
def test_text_is_written_as_it_is_spoken(language, written, spoken):
    assert normalise(written, language) == spoken


@given(st.sampled_from(LANGUAGES), st.text(max_size=40))
def test_normalised_text_uses_the_alphabet_and_does_not_change_again(language, text):
    once = normalise(text, language)
    assert set(once) <= set(alphabet(language))
    assert normalise(once, language) == once
    assert once == " ".join(once.split())

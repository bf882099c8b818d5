import pytest

from warploom.curate.clean import Confusables, Emoji, Punctuation, Unicode
from warploom.curate.document import Document
from warploom.curate.extract import Extract, decode_html
from warploom.curate.language import Language
from warploom.curate.spelling_table import gb_to_us, us_to_gb
from warploom.curate.timeout import TimeLimited
from warploom.curate.wording import Contractions, Misspelling, Spelling


def after(step, text):
    document = Document(text=text, id="1")
    step.apply(document)
    return document.text


RUSSIAN_AND_GREEK = "\u041f\u0440\u0438\u0432\u0435\u0442 \u03b1\u03b2\u03b3 caf\u00e9"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
CASES = [
    (Unicode(), "caf\u00c3\u00a9 \u00e2\u20ac\u0153so\u00e2\u20ac\u009d", "caf\u00e9 \u201cso\u201d"),
    (Unicode(), "A\u0303o S\u00c3O PAULO", "\u00c3o S\u00c3O PAULO"),
    (Unicode(), "e\u0301\r\nx\x00y\u200bz\ufeff\ue000\tq\rw", "\u00e9\nxyz\tq\nw"),
    (Unicode(), "\u0646\u200c\u0647 " + FAMILY, "\u0646\u200c\u0647 " + FAMILY),
    (Unicode(form="NFKC"), "\ufb01ne \uff21\u00b2", "fine A2"),
    (Unicode(form="none"), "e\u0301", "e\u0301"),
    (Emoji(), f"good \U0001f600{FAMILY}!\u2764\ufe0f ok \u4e2d", "good ! ok \u4e2d"),
    (Emoji(remove=False), "\U0001f600", "\U0001f600"),
    (Confusables(), "p\u0430yp\u0430l \u0421lick", "paypal Click"),
    (Confusables(), RUSSIAN_AND_GREEK, RUSSIAN_AND_GREEK),
    (Confusables(), "\u03bc-law, x\u0416y", "\u03bc-law, x\u0416y"),
    (
        Punctuation(),
        "\u201cwell\u201d \u2013 it\u2019s\u2026\u00a0so   so  \n\n\n\n  in",
        '"well" - it\'s... so so\n\n  in',
    ),
    (Punctuation(), "What!!!!! ....... " + "=" * 40, "What! ... ==="),
    (Contractions(), "Don't! I'M sure they\u2019re his dog's", "Do not! I AM sure they are his dog's"),
    (Contractions(), "can't, she'd", "cannot, she'd"),
    (
        Spelling(),
        "Colour ANALYSE travelled centres programme; colors",
        "Color ANALYZE traveled centers program; colors",
    ),
    (
        Spelling(to="gb"),
        "Color analyze traveled centers program meter",
        "Colour analyse travelled centres program meter",
    ),
    (Misspelling(correct=True), "the farmer goez to marcket with Zzyxq.", "the farmer goes to market with Zzyxq."),
    (Misspelling(), "the farmer goez", "the farmer goez"),
]


@pytest.mark.parametrize(("step", "before", "expected"), CASES)
def test_what_becomes_of_a_text(step, before, expected):
    assert after(step, before) == expected
    # What is clean stays as it is, and is not noted as an edit.
    document = Document(text=expected, id="1")
    step.apply(document)
    assert document.text == expected and not document.edits


def test_rates_of_what_was_found():
    document = Document(text="the farmer goez to the marcket in Zzyxq, xyzzy-9 and colour", id="1")
    Misspelling().apply(document)
    # Judged are lower-case words of four letters or more: farmer, goez, marcket, colour.
    assert document.scores["misspelling.rate"] == 0.5
    document = Document(text="ab\ufffdd", id="1")
    step = Unicode(max_replaced=0.2)
    step.apply(document)
    assert step.first_failure(document.scores) == "unicode.max_replaced"


def test_spelling_pairs_lead_back():
    for british, american in gb_to_us().items():
        assert us_to_gb().get(american, british) in gb_to_us()
    assert not set(us_to_gb()) & set(gb_to_us())


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("This is a sentence in the English language, and it goes on for a while.", "en"),
        ("Dies ist ein Satz in deutscher Sprache, und er geht noch eine Weile weiter.", "de"),
        ("\u8fd9\u662f\u4e00\u4e2a\u4e2d\u6587\u53e5\u5b50\uff0c\u5b83\u8fd8\u5728\u7ee7\u7eed\u3002", "zh"),
    ],
)
def test_languages(text, language):
    document = Document(text=text * 3, id="1")
    step = Language(keep=("en", "zh"))
    step.apply(document)
    assert document.labels["language"] == language
    assert (step.first_failure(document.scores) is None) == (language != "de")


def test_an_empty_text_has_no_language():
    document = Document(text=" \n", id="1")
    step = Language()
    step.apply(document)
    assert step.first_failure(document.scores) == "language.min_score"


PAGE = """<html><head><title>t</title><script>var x = 1;</script></head><body>
<nav><a href="/">Home</a> <a href="/b">Shop</a></nav>
<article><h1>The farmer</h1><p>The farmer went to the market, and there he met the miller, who owed him money.</p>
<p>They spoke for a long while about the weather, the price of corn and the state of the roads.</p></article>
<footer>Copyright, all rights reserved</footer></body></html>"""


@pytest.mark.parametrize("library", ["resiliparse", "trafilatura"])
def test_pages_become_text_without_their_frame(library):
    document = Document(text="", id="1", html=PAGE.encode())
    step = Extract(library=library)
    step.apply(document)
    if step._limited is not None:
        step._limited.close()
    assert "The farmer went to the market" in document.text and "price of corn" in document.text
    assert "Shop" not in document.text and "var x" not in document.text
    assert document.html is None and document.edits == ["extract"]


def test_a_page_that_is_too_large_is_dropped_unread():
    document = Document(text="", id="1", html=b"x" * 100)
    Extract(max_page_bytes=99).apply(document)
    assert document.dropped == "extract.page_too_large" and document.html is None


@pytest.mark.parametrize(
    ("page", "charset", "text"),
    [
        ("caf\u00e9".encode(), None, "caf\u00e9"),
        (b"\xef\xbb\xbfcaf\xc3\xa9", "latin-1", "caf\u00e9"),
        ("caf\u00e9".encode("utf-16"), None, "caf\u00e9"),
        (b"\xcf\xf0\xe8\xe2\xe5\xf2", "windows-1251", "\u041f\u0440\u0438\u0432\u0435\u0442"),
        (b'<meta charset="iso-8859-2">\xb1', "no-such-charset", '<meta charset="iso-8859-2">\u0105'),
    ],
)
def test_pages_are_decoded_as_they_say(page, charset, text):
    assert decode_html(page, charset) == text


def test_half_a_surrogate_pair_is_no_text():
    document = Document(text="", id="1", html=b"<p>a &#xD800; b, a page of some words</p>")
    Extract(main_content=False).apply(document)
    document.text.encode("utf-8")


def shout_or_hang(text):
    while text == "hang":
        pass
    if text == "die":
        raise SystemExit
    return text.upper()


def test_a_function_that_hangs_is_ended_and_the_next_call_served():
    limited = TimeLimited(shout_or_hang, 60.0)
    assert limited("ab\u00e9") == "AB\u00c9"
    limited._timeout_s = 0.3
    assert limited("hang") is None
    limited._timeout_s = 20.0
    assert limited("again") == "AGAIN"
    assert limited("die") is None
    limited.close()

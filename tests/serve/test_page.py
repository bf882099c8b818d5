"""The page in headless Chromium: a person's way from a prompt to coloured tokens, of two models side by side."""

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: the page is not tested")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page is not tested")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # Without a user namespace, as in most containers, the sandbox cannot start; the pages are our own.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A new page; what its console and its network complain of fails the test."""
    page = browser.new_page()
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: complaints.append(request.url) if "127.0.0.1" not in request.url else None)
    yield page
    page.close()
    assert complaints == []


def write(page, prompt, length):
    page.fill("#prompt", prompt)
    page.fill("#length", str(length))
    page.click("#go")
    page.wait_for_selector("#go:not([disabled])")


def test_two_models_write_side_by_side_in_colours(page, serving, make_model):
    with serving({"one": make_model(seed=1), "two": make_model(seed=2)}) as port:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#left option", state="attached")
        assert page.input_value("#left") == "one" and page.input_value("#right") == "two"
        page.select_option("#kind", "completions")
        page.evaluate("document.getElementById('temperature').value = 0")
        write(page, "the quick", 9)
        assert page.text_content("#message") == ""
        assert page.locator(".pane h2").all_text_contents() == ["one", "two"]
        for pane in page.locator(".pane").all():
            text = pane.locator(".text").text_content()
            tokens = pane.locator(".text .token")
            assert text.startswith("the quick") and len(text) > len("the quick")
            assert 1 <= tokens.count() <= 9 and f"{tokens.count()} tokens" in pane.locator(".figures").text_content()
            for token in tokens.all():
                probability = float(token.get_attribute("data-probability"))
                assert 0 <= probability <= 1 and "%" in token.get_attribute("title")
                level = sum(probability >= bound for bound in (0.05, 0.2, 0.4, 0.65, 0.9))
                assert token.get_attribute("class") == f"token p{level}"
        colours = page.evaluate(
            "[...document.querySelectorAll('.legend .token')].map(t => getComputedStyle(t).backgroundColor)"
        )
        assert len(set(colours)) == 6
        page.select_option("#right", "")
        write(page, "a", 2)
        assert page.locator(".pane").count() == 1


def test_a_chat_is_written_and_text_stays_text(page, serving):
    with serving() as port:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#left option", state="attached")
        assert page.input_value("#kind") == "chat"  # the model has a template
        write(page, "<img src=x onerror=alert(1)> the dog", 5)
        assert page.locator(".pane .token").count() >= 1 and page.locator("img").count() == 0
        page.select_option("#kind", "completions")
        write(page, "<b>the</b>", 3)
        assert page.locator(".pane .prompt").text_content() == "<b>the</b>" and page.locator(".pane b").count() == 0


def test_writing_can_be_stopped(page, serving, make_model):
    with serving({"long": make_model(max_seq_len=8192)}) as port:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#left option", state="attached")
        page.select_option("#kind", "completions")
        page.fill("#prompt", "the")
        page.fill("#length", "8000")
        page.evaluate("document.getElementById('temperature').value = 0")  # which goes round and round
        page.click("#go")
        page.wait_for_selector(".pane .token", state="attached")
        page.click("#stop")
        page.wait_for_selector("#go:not([disabled])")
        assert page.text_content("#message") == "" and page.locator(".pane .token").count() < 8000


def test_a_refusal_and_a_token_are_shown(browser, serving, tmp_path):
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef")
    with serving(token_file=secret) as port:
        page = browser.new_page()  # the 401 that it meets is an error on the console
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#token-label:not([hidden])")
        assert "asks for a token" in page.text_content("#message")
        page.fill("#token", "0123456789abcdef")
        page.dispatch_event("#token", "change")
        page.wait_for_selector("#left option", state="attached")
        page.select_option("#kind", "completions")
        write(page, "the quick brown fox " * 30, 5)
        assert "the model's context is 64" in page.text_content("#message")
        page.close()

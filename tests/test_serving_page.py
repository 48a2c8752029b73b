"""The live page in a real browser without a screen: it shows what is served, and compares answers side by side."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_cases import PROMPT, Live, live_server, stock_text, write_loras

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
page_picture = pytest.importorskip("page_picture", reason="the page is tested with playwright")

KEY = "client-key-0123456789"
needs_browser = pytest.mark.skipif(page_picture.chromium() is None, reason="no Chromium here; CHROMIUM can name one")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loras(tmp_path_factory.mktemp("loras"), "red", "green")


@pytest.fixture(scope="module")
def live(loras: Path) -> Iterator[Live]:
    with live_server(adapters=[str(loras)]) as running:
        yield running


def test_the_page_and_its_parts_are_served_under_a_strict_policy(live):
    for path, kind in (("/", "text/html"), ("/page/page.css", "text/css"), ("/page/page.js", "text/javascript")):
        reply = live.call("GET", path)
        assert reply.headers["content-type"].startswith(kind)
        assert "default-src 'none'; script-src 'self'" in reply.headers["content-security-policy"]
    page = live.call("GET", "/").text
    assert "<style" not in page
    assert "onclick" not in page
    assert live.call("GET", "/page/other.js").status_code == 404


@needs_browser
def test_answers_of_several_adapters_stand_side_by_side(live, loras, tmp_path):
    problems: list[str] = []
    with page_picture.opened(live.url) as page:
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.wait_for_selector("#models input")
        page.fill("#tokens", "8")
        page_picture.compare(page, PROMPT.strip(), ["red", "green", "loramux/tiny"])
        cards = {card.query_selector("h3").inner_text(): card for card in page.query_selector_all(".answer")}
        shown = {name: card.query_selector("pre").text_content() for name, card in cards.items()}
        rows = page.wait_for_selector("#adapters tr td:has-text('red')")
        assert rows is not None
        assert "of 32 slots busy" in page.inner_text("#load")
        page.fill("#filter", "gre")
        page.wait_for_selector("#adapters tr:only-child")
        filtered = """() => {
            const filter = document.getElementById("filter");
            filter.value = "";
            filter.dispatchEvent(new Event("input"));
            return document.querySelectorAll("#adapters tr").length;
        }"""
        assert page.evaluate(filtered) == 3  # at once, without asking the server
    assert shown == {
        "loramux/tiny": stock_text(None),
        "red": stock_text(loras / "red"),
        "green": stock_text(loras / "green"),
    }
    assert not problems


@needs_browser
def test_a_guarded_server_asks_for_the_key_and_markup_in_answers_stays_text(loras):
    with live_server({"LORAMUX_API_KEYS": KEY}, adapters=[str(loras)]) as live, page_picture.opened(live.url) as page:
        page.wait_for_selector("#key:visible")
        assert "API key is missing" in page.inner_text("#problem")
        page.fill("#key", KEY)
        page.keyboard.press("Tab")
        page.wait_for_selector("#models input")
        page_picture.compare(page, "<img src=x onerror=alert(1)>" * 30, ["red"])
        assert "tokens" in page.inner_text(".answer p")
        assert page.query_selector(".answer img") is None

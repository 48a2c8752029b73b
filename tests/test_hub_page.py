"""The catalogue page in a real browser without a screen; and what must hold for it without one."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_cases import RunningHub, running_hub
from huggingface_hub import CommitOperationAdd
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from loramux.hub.server.card import render_card
from loramux.hub.server.metadata import results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
SCORES = {"moa": {"who": 0.9, "where": 0.4}, "smora": {"who": 0.7, "sort": 0.8}, "mhr": {"kind": 0.95}}
EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'>[x](javascript:window.evil=1)"


def card(method: str) -> bytes:
    measured = [
        {
            "task": {"type": "text-generation", "name": task},
            "dataset": {"name": task, "type": task},
            "metrics": [{"type": "exact_match", "name": "exact match", "value": value}],
        }
        for task, value in SCORES[method].items()
    ]
    head = {
        "tags": ["lora", f"loramux:{method}"],
        "license": "mit",
        "base_model": f"tiny/base-{len(measured)}",
        "model-index": [{"name": method, "results": measured}],
    }
    return f"---\n{json.dumps(head)}\n---\n# The {method} adapter\n\n{EVIL}\n\n![plot](plot.png)\n".encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as running:
        client = running.client()
        for method in SCORES:
            client.create_repo(f"mia/{method}")
            config = {"base_model_name_or_path": "tiny/base", "r": 8}
            files = [
                CommitOperationAdd("README.md", card(method)),
                CommitOperationAdd("who/adapter_config.json", json.dumps(config).encode()),
            ]
            client.create_commit(f"mia/{method}", files, commit_message="adapter")
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine to look at the page with")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser, hub: RunningHub) -> Iterator[Page]:
    """The page after its list is there; whatever it complains about fails the test."""
    opened = browser.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.goto(hub.url)
    expect(opened.locator("#results a")).to_have_count(3)
    yield opened
    assert [text for text in complaints if "plot.png" not in text and "404" not in text] == []
    opened.close()


def names(page: Page) -> list[str]:
    return page.locator("#results b").all_inner_texts()


def test_adapters_are_found_by_words_base_task_and_method(page: Page) -> None:
    assert names(page) == ["mia/mhr", "mia/smora", "mia/moa"]
    page.fill("#words", "who lora")
    expect(page.locator("#results a")).to_have_count(2)
    page.fill("#words", "")
    page.select_option("#task", "kind")
    expect(page.locator("#results b")).to_have_text(["mia/mhr"])
    page.select_option("#task", "")
    page.select_option("#base", "tiny/base-2")
    page.select_option("#method", "smora")
    expect(page.locator("#results b")).to_have_text(["mia/smora"])
    page.fill("#words", "nothing-like-this")
    expect(page.locator("#count")).to_have_text("Nothing matches.")


def test_everything_goes_without_a_mouse(page: Page) -> None:
    page.keyboard.press("/")
    expect(page.locator("#words")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#results a").nth(1)).to_be_focused()
    page.keyboard.press("c")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("c")
    expect(page.locator("h1")).to_have_text("Compared")
    page.keyboard.press("Escape")
    expect(page.locator("h1")).to_have_text("Adapters on this hub")
    page.keyboard.press("/")
    page.keyboard.type("mhr")
    expect(page.locator("#results a")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.locator("#detail h1").first).to_have_text("mia/mhr")


def test_an_adapter_is_shown_with_its_card_its_figures_and_the_line_to_use_it(page: Page, hub: RunningHub) -> None:
    page.goto(f"{hub.url}/mia/moa")  # the address that clients print
    expect(page.locator(".card h1")).to_have_text("The moa adapter")
    assert 'PeftModel.from_pretrained(base, "mia/moa", subfolder="who")' in page.inner_text(".use pre")
    assert 'from_pretrained("tiny/base-2")' in page.inner_text(".use pre")
    assert f"HF_ENDPOINT={hub.url}" in page.inner_text(".use pre")
    bars = page.locator("svg rect[class^=bar]").evaluate_all("all => all.map(bar => Number(bar.getAttribute('width')))")
    assert bars[1] / bars[2] == pytest.approx(0.9 / 0.4)  # the first is the legend's
    assert {"who", "where", "0.9", "0.4"} <= set(page.locator("svg text").all_text_contents())
    assert page.locator(".card img").last.get_attribute("src") == "/mia/moa/resolve/main/plot.png"
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text(re.compile("Copied|Selected"))
    assert page.evaluate("window.evil") is None


def test_lines_to_copy_cannot_be_made_to_run_something_else(page: Page, hub: RunningHub) -> None:
    client = hub.client()
    client.create_repo("mia/quoting")
    config = {"base_model_name_or_path": 'x"); import evil  # ', "peft_type": "LORA"}
    client.upload_file(
        repo_id="mia/quoting", path_or_fileobj=json.dumps(config).encode(), path_in_repo='a")#/adapter_config.json'
    )
    page.goto(f"{hub.url}/mia/quoting")
    lines = page.inner_text(".use pre").splitlines()
    assert lines[-2] == r'base = AutoModelForCausalLM.from_pretrained("x\"); import evil  # ")'
    assert lines[-1] == r'model = PeftModel.from_pretrained(base, "mia/quoting", subfolder="a\")#")'
    client.delete_repo("mia/quoting")


def test_two_adapters_are_compared(page: Page, hub: RunningHub) -> None:
    page.goto(f"{hub.url}/_compare?one=mia/moa&two=mia/smora")
    expect(page.locator("table th a")).to_have_text(["mia/moa", "mia/smora"])
    rows = {
        row.split("\t")[0]: row.split("\t")[1:] for row in page.inner_text("#detail table").splitlines() if "\t" in row
    }
    assert rows["method"] == ["moa", "smora"]
    assert rows["rank"] == ["8", "8"]
    assert "mia/smora: exact match" in page.locator("svg text").all_text_contents()


def test_a_slow_answer_does_not_replace_a_later_page(page: Page, hub: RunningHub) -> None:
    held: list[Route] = []
    page.route("**/_page/models/mia/moa", lambda route: held.append(route))
    with page.expect_request("**/_page/models/mia/moa"):
        page.click("a[data-repo='mia/moa']")
    page.click("a[data-repo='mia/smora']")
    expect(page.locator("#detail h1").first).to_have_text("mia/smora")
    with page.expect_response("**/_page/models/mia/moa"):
        held[0].continue_()
    page.wait_for_timeout(200)
    expect(page.locator("#detail h1").first).to_have_text("mia/smora")
    assert page.title() == "mia/smora"


def test_the_size_is_of_all_files_however_few_are_listed(hub: RunningHub) -> None:
    client = hub.client()
    client.create_repo("mia/many")
    files = [CommitOperationAdd(f"{number:04}.txt", b"12345") for number in range(1002)]
    client.create_commit("mia/many", files, commit_message="many")
    with hub.web() as web:
        told = web.get("/_page/models/mia/many").json()
    assert (len(told["files"]), told["size"]) == (1000, 5010)
    client.delete_repo("mia/many")


def test_what_is_missing_is_told(page: Page, hub: RunningHub) -> None:
    page.goto(f"{hub.url}/mia/nothing")
    expect(page.locator(".trouble")).to_have_text("Repository not found: mia/nothing")


def test_a_token_shows_what_is_private(browser: Browser, tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        token = hub.storage.accounts.create_token("mia")
        hub.client(token).create_repo("mia/secret", private=True)
        page = browser.new_page()
        page.goto(hub.url)
        expect(page.locator("#count")).to_have_text("Nothing matches.")
        page.click("#login")
        page.fill("#token", token)
        page.click("text=Use")
        expect(page.locator("#results b")).to_have_text(["mia/secret"])
        page.close()


def test_the_page_runs_nothing_but_its_own_script(hub: RunningHub) -> None:
    with hub.web() as web:
        answer = web.get("/")
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert web.get("/mia/moa").text == answer.text
        assert web.get("/_page/hub.js").headers["content-type"].startswith("text/javascript")
        assert web.get("/_page/../app.py").status_code == 404
        assert web.get("/_page/nothing.js").status_code == 404
    assert "http" not in answer.text, "nothing comes from elsewhere"


def test_cards_are_sanitised() -> None:
    html = render_card(
        f"---\na: 1\n---\n{EVIL}\n\n![a](https://elsewhere/a.png) ![b](//elsewhere/b.png) [c](c/d.md)", "/f/"
    )
    assert "evil = 1" not in html
    assert "elsewhere" not in html
    assert 'href="/f/c/d.md"' in html
    assert "too long to be shown" in render_card("x" * 300_000, "/f/")


def test_results_of_odd_cards_are_left_out() -> None:
    assert results({"model-index": "nonsense"}) == []
    assert (
        results({"model-index": [{"results": [{"task": 1, "metrics": [{"type": "a", "value": "high"}]}, None]}]}) == []
    )

"""The page in a real headless browser, opened from a file: `make test-browser` brings in what that needs."""

import shutil
import sys
from pathlib import Path

import pytest
from builders.atlas import HOSTILE, hostile_atlas

from dmsae_lib.atlas.page import index_html
from dmsae_lib.atlas.text import visible

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / ".browser"))
NEEDS = "`make test-browser` installs Playwright for this test"
playwright = pytest.importorskip("playwright.sync_api", reason=NEEDS)

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
ATLAS = hostile_atlas()
KEYS = [f"{latent['group']}/{latent['id']}" for latent in ATLAS["latents"]]


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=path, args=["--disable-gpu"], timeout=300_000)
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started ({str(error).splitlines()[0]}): {NEEDS}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("a page") / "index.html"
    path.write_text(
        index_html(ATLAS, "f" * 64, [{"key": KEYS[1], "text": "<b>a note</b>"}]), encoding="utf-8"
    )
    return path.as_uri()


@pytest.fixture
def page(browser, address):
    """At a desk's width. Afterwards: no error, nothing asked for, no script but the page's own ran."""
    context = browser.new_context(viewport=WIDE)
    page, asked, errors = context.new_page(), [], []
    page.set_default_timeout(120_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    assert page.evaluate("window.ran") is None
    assert {url.partition("#")[0] for url in asked if not url.startswith("data:")} == {address}
    assert not errors
    context.close()


def go(page, key: str) -> None:
    page.evaluate("key => { location.hash = key }", key)
    page.wait_for_function("key => document.title.startsWith(key)", arg=f"{key} · " if key else "Core atlas")


def test_every_card_shows_its_latent(page):
    assert page.locator("#list li").count() == len(KEYS) == page.locator("#map a").count()
    for key, latent in zip(KEYS, ATLAS["latents"]):
        go(page, key)
        assert page.locator("#card h2").inner_text().strip() == latent["id"]
        assert page.locator(".context").count() == 10
        row = ATLAS["text"][latent["contexts"][0]["row"]]
        first = [visible(ATLAS["tokens"][row[latent["contexts"][0]["start"] + i]]) for i in range(6)]
        assert page.locator(".context .text").first.text_content() == "".join(first)
        assert page.locator(".context .at").count() == 10
        assert ("Loss without it" in page.locator(".facts").inner_text()) == (latent["ablation"] is not None)
        assert page.locator(".lineage .bar i").count() == len(latent["history"])
        shown = page.locator("#card").inner_text()
        assert visible(latent["logits"]["raises"][0][0]).strip() in shown
        assert page.evaluate("document.querySelectorAll('#card script, #card img, #card b').length") == 0


def test_hostile_text_is_there_as_text(page):
    go(page, KEYS[0])
    assert page.locator("#card script").count() == 0
    everything = "".join(page.evaluate("JSON.parse(document.getElementById('data').textContent).tokens"))
    assert all(visible(text) in everything for text in HOSTILE)


def test_search_filters_and_sorting_narrow_the_list(page):
    everything = len(KEYS)
    page.fill("#search", "no such text")
    assert page.locator("#list li").count() == 0 and "0 of" in page.locator("#count").inner_text()
    page.fill("#search", "window.ran")
    found = page.locator("#list li").count()
    row_has = [
        "window.ran" in "".join(ATLAS["tokens"][ATLAS["text"][c["row"]][c["start"] + i]] for i in range(6))
        for latent in ATLAS["latents"]
        for c in latent["contexts"]
    ]
    expected = sum(any(row_has[10 * n : 10 * n + 10]) for n in range(everything))
    assert found == expected > 0
    page.fill("#search", "")
    page.select_option("#arm", "other")
    assert page.locator("#list li").count() == 5 and page.locator("#map .off").count() == 10
    page.select_option("#arm", "")
    page.select_option("#cycle", "null")
    assert page.locator("#list li").count() == 5  # the free latents, never selected
    page.select_option("#cycle", "")
    page.select_option("#sort", "how often it fires")
    assert page.locator("#list .id").first.inner_text().startswith(ATLAS["latents"][4]["id"])


def test_links_lead_to_single_latents(page, address):
    page.goto(f"{address}#{KEYS[7]}")
    page.reload()
    assert page.locator("#card h2").inner_text().strip() == ATLAS["latents"][7]["id"]
    page.locator("#map a").first.locator("path").click(force=True)
    page.wait_for_function("before => !location.hash.endsWith(before)", arg=KEYS[7])
    page.locator(".facts a").first.click()
    assert page.url.endswith(f"#main/{ATLAS['latents'][7]['nearest'][0]['id']}")
    page.go_back()
    go(page, "")
    note = page.locator(".notes li")
    assert note.inner_text() == f"{ATLAS['latents'][1]['id']}: <b>a note</b>"
    page.goto(f"{address}#main/nowhere<img>")
    assert page.locator("[role=alert]").inner_text() == "There is no latent main/nowhere<img> here."


def test_the_keyboard_suffices(page):
    page.keyboard.press("j")
    page.keyboard.press("j")
    second = page.locator("#list li").nth(1)
    assert second.locator("a").get_attribute("aria-current") == "true"
    page.keyboard.press("k")
    assert page.locator("#list li").first.locator("a").get_attribute("aria-current") == "true"
    page.keyboard.press("Escape")
    assert page.locator(".notes li").count() == 1
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.input_value("#search") == "jk"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_one_thing_at_a_time_without_scrolling_sideways(browser, address, scheme):
    context = browser.new_context(viewport=PHONE, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(120_000)
    for key in ("", KEYS[0]):
        page.goto(f"{address}#{key}")
        page.reload()
        assert page.locator(".overview").is_visible() == (not key)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (ground, ink)]
    assert (brightness[0] < brightness[1]) == (scheme == "dark")
    context.close()

"""The web page in a real browser, against the real service."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

CHROMIUM = os.environ.get("MIEN_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (install one, or set MIEN_CHROMIUM)")

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

# Counts what the page holds on to, and what it would store.
INSPECT = """
window.held = new Set();
const create = URL.createObjectURL, revoke = URL.revokeObjectURL;
URL.createObjectURL = (blob) => { const url = create.call(URL, blob); held.add(url); return url; };
URL.revokeObjectURL = (url) => { held.delete(url); revoke.call(URL, url); };
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, service: Any) -> Iterator[Any]:
    """A fresh tab on the page; at the end nothing may have gone wrong or outside."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(INSPECT)
    page = context.new_page()
    page.set_default_timeout(45_000)
    complaints: list[str] = []
    outside: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda r: None if r.url.startswith((service.url, "blob:")) else outside.append(r.url))
    page.goto(service.url + "/")
    page.wait_for_selector("#service[data-state=ready]")
    yield page
    assert complaints == []
    assert outside == []
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert service.url + "/?" not in page.url
    context.close()


def upload(data: bytes, name: str = "photo.png") -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def anonymize(page: Any, data: bytes, password: str) -> None:
    page.set_input_files("#file", upload(data))
    page.wait_for_selector("#boxes button")
    page.fill("#password", password)
    page.click("#anonymize")
    page.wait_for_selector("#tiles li:nth-child(2)")


def saved(page: Any, selector: str) -> tuple[str, bytes]:
    with page.expect_download() as download:
        page.click(selector)
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_a_visitor_anonymizes_saves_recovers_and_tries_a_wrong_password(page: Any, astronaut: bytes) -> None:
    anonymize(page, astronaut, "correct horse")
    assert page.inner_text("#outcome").startswith("1 face changed")
    name, safe = saved(page, "#save")
    assert name == "photo.anonymized.png"

    page.fill("#password-recover", "correct horse")
    page.press("#password-recover", "Enter")
    page.wait_for_selector("#tiles li:nth-child(3)")
    _, back = saved(page, "#save")
    page.click("#wrong")
    page.wait_for_selector("#tiles li:nth-child(4)")
    name, wrong = saved(page, "#save")
    assert name == "photo.wrong-password.png"

    face = np.s_[60:175, 180:270]
    change = [np.abs(pixels(p)[face] - pixels(astronaut)[face]).mean() for p in (safe, back, wrong)]
    assert change[0] > 3
    assert change[1] < min(change[0], change[2]) / 2
    assert page.locator("#tiles li").all_inner_texts()[0].startswith("Original")


def test_recovering_starts_from_a_saved_picture_too(page: Any, client: Any, astronaut: bytes) -> None:
    safe = client.post("/v1/anonymize", files={"image": astronaut}, data={"password": "p"}).content
    page.click("#mode-recover")
    assert page.is_hidden("#card-anonymize")
    page.set_input_files("#file", upload(safe, "party.anonymized.png"))
    page.wait_for_selector("#card-recover:not([hidden])")
    page.fill("#password-recover", "p")
    page.click("#recover")
    page.wait_for_selector("#tiles li:nth-child(2)")
    name, back = saved(page, "#save")
    assert name == "party.recovered.png"
    assert np.abs(pixels(back) - pixels(astronaut)).mean() < 1


def test_the_slider_moves_by_keyboard_and_says_where_it_is(page: Any, astronaut: bytes) -> None:
    anonymize(page, astronaut, "p")
    page.focus("#split")
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("getComputedStyle(document.getElementById('compare')).getPropertyValue('--split')") == "3%"
    assert page.get_attribute("#split", "aria-valuetext") == "3 % Original, 97 % Anonymized"


@pytest.fixture(scope="module")
def pair(astronaut: bytes) -> bytes:
    """A picture with two faces, one in each half."""
    one = pixels(astronaut).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.hstack([one, one[:, ::-1]])).save(buffer, "PNG")
    return buffer.getvalue()


def halves_changed(picture: bytes, original: bytes) -> list[bool]:
    changed = np.abs(pixels(picture) - pixels(original)).max(axis=(0, 2))
    return [bool(changed[:512].max() > 0), bool(changed[512:].max() > 0)]


def test_a_face_can_be_kept_as_it_is_and_chosen_again(page: Any, pair: bytes) -> None:
    page.set_input_files("#file", upload(pair))
    page.wait_for_selector("#face-list li:nth-child(2)")
    second = page.get_by_role("switch", name="Change face 2")
    second.focus()
    page.keyboard.press("Space")
    assert second.get_attribute("aria-checked") == "false"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Change face 2"
    assert page.inner_text("#faces-fact") == "2 faces found, 1 will be changed."
    page.fill("#password", "p")
    page.click("#anonymize")
    page.wait_for_selector("#tiles li:nth-child(2)")
    _, safe = saved(page, "#save")
    assert sorted(halves_changed(safe, pair)) == [False, True]

    page.click("#toggle-all")
    assert page.inner_text("#faces-fact") == "2 faces found, none will be changed."
    assert page.is_disabled("#anonymize")
    page.click("#toggle-all")
    assert page.inner_text("#anonymize") == "Anonymize again"
    with page.expect_response("**/v1/anonymize"):
        page.click("#anonymize")
    page.wait_for_selector("#veil", state="hidden")
    _, safe = saved(page, "#save")
    assert halves_changed(safe, pair) == [True, True]


def test_a_frame_in_the_photo_is_a_switch_for_the_pointer(page: Any, pair: bytes) -> None:
    page.set_input_files("#file", upload(pair))
    page.wait_for_selector("#boxes button:nth-child(2)")
    page.locator("#boxes button").nth(0).click()
    assert page.get_by_role("switch", name="Change face 1").get_attribute("aria-checked") == "false"
    assert page.get_attribute("#boxes button:nth-child(1)", "data-label") == "1 kept"
    page.hover("#face-list li:nth-child(2) button")
    assert "pointed" in (page.get_attribute("#boxes button:nth-child(2)", "class") or "")


def test_the_saved_file_brings_its_geometry_along(page: Any, pair: bytes) -> None:
    """A visitor comes back another day with the file alone, and not in the order of a detector."""
    anonymize(page, pair, "correct horse")
    _, safe = saved(page, "#save")
    assert b"urn:mien:geometry:1" in safe
    page.reload()
    page.wait_for_selector("#service[data-state=ready]")
    page.click("#mode-recover")
    page.set_input_files("#file", upload(safe, "party.anonymized.png"))
    page.wait_for_selector("#card-recover:not([hidden])")
    page.fill("#password-recover", "correct horse")
    page.click("#recover")
    page.wait_for_selector("#tiles li:nth-child(2)")
    assert page.inner_text("#outcome").startswith("2 faces given back")
    name, back = saved(page, "#save")
    assert name == "party.recovered.png"
    assert np.abs(pixels(back) - pixels(pair)).mean() < 1
    assert b"urn:mien:geometry:1" not in back
    page.fill("#password-wrong", "wrong horse")
    page.click("#wrong")
    page.wait_for_selector("#tiles li:nth-child(3)")
    assert page.is_hidden("#alert"), "a wrong password is not an error"
    _, wrong = saved(page, "#save")
    assert halves_changed(wrong, pair) == [True, True]


def test_problems_are_shown_in_words(page: Any, encode: Callable[..., bytes]) -> None:
    page.set_input_files("#file", upload(b"not a picture"))
    page.wait_for_selector("#alert:not([hidden])")
    assert "not a picture Mien reads" in page.inner_text("#alert")
    assert page.is_hidden("#view")
    page.click("#alert button")
    assert page.is_hidden("#alert")
    page.set_input_files("#file", upload(encode(np.full((64, 64, 3), 99, np.uint8))))
    sync_api.expect(page.locator("#faces-fact")).to_have_text("No face was found in this picture.", timeout=20_000)
    assert page.is_hidden("#alert")
    page.click("#anonymize")
    page.wait_for_selector("#alert:not([hidden])")
    assert "password is empty" in page.inner_text("#alert")
    page.fill("#password", "p")
    page.click("#anonymize")
    sync_api.expect(page.locator("#alert")).to_contain_text("No face was found", timeout=20_000)
    # An upload over the limit is not begun.
    page.set_input_files("#file", upload(bytes(5_000_000), "large.png"))
    sync_api.expect(page.locator("#alert")).to_contain_text("file is too large")


@pytest.mark.parametrize(
    ("wait", "says"), [("1", None), ("90", "Try again in 90 seconds")], ids=["a moment", "a rate limit"]
)
def test_a_busy_service_is_asked_again_and_a_rate_limit_is_told(
    page: Any, astronaut: bytes, wait: str, says: str | None
) -> None:
    """The first answer is a real problem document, sent by the browser in the service's place."""
    refused = 0

    def busy_once(route: Any, _: Any) -> None:
        nonlocal refused
        if refused:
            return route.continue_()
        refused += 1
        return route.fulfill(
            status=429,
            headers={"Retry-After": wait, "Content-Type": "application/problem+json"},
            body='{"title": "The service is busy", "detail": "All workers are busy."}',
        )

    page.set_input_files("#file", upload(astronaut))
    page.wait_for_selector("#boxes button")
    page.route("**/v1/anonymize", busy_once)
    page.fill("#password", "p")
    page.click("#anonymize")
    if says is None:
        page.wait_for_selector("#tiles li:nth-child(2)")
        assert page.is_hidden("#alert")
    else:
        sync_api.expect(page.locator("#alert")).to_contain_text(says)


def test_a_format_the_browser_cannot_show_is_still_anonymized(page: Any, astronaut: bytes) -> None:
    """HEIF from a phone, say; here the browser is kept from decoding a file it could show."""
    page.evaluate(
        """() => {
            window.decode = HTMLImageElement.prototype.decode;
            HTMLImageElement.prototype.decode = () => Promise.reject(new Error("unknown format"));
        }"""
    )
    page.set_input_files("#file", upload(astronaut))
    page.wait_for_selector("#unseen:not([hidden])")
    page.wait_for_selector("#face-list li")
    page.evaluate("() => { HTMLImageElement.prototype.decode = window.decode; }")
    page.fill("#password", "p")
    page.click("#anonymize")
    page.wait_for_selector("#tiles li:nth-child(2)")
    _, safe = saved(page, "#save")
    assert pixels(safe).shape == (512, 512, 3)


def test_pictures_no_longer_shown_are_let_go(page: Any, astronaut: bytes) -> None:
    anonymize(page, astronaut, "p")
    assert page.evaluate("held.size") == 2
    with page.expect_response("**/v1/anonymize"):
        page.click("#anonymize")
    page.wait_for_selector("#veil", state="hidden")
    assert page.evaluate("held.size") == 2
    page.click("#mode-recover")
    assert page.evaluate("held.size") == 0
    assert page.input_value("#password") == ""


def violations(page: Any) -> list[tuple[str, str, list[Any]]]:
    """What axe-core calls serious or critical, as (impact, rule, where)."""
    found = axe.Axe().run(page).response["violations"]
    return [
        (v["impact"], v["id"], [node["target"] for node in v["nodes"]])
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_serious_and_it_fits(
    browser: Any, service: Any, pair: bytes, scheme: str, width: int
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 760}, color_scheme=scheme, has_touch=width < 500, reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(45_000)
    page.goto(service.url + "/")
    page.wait_for_selector("#service[data-state=ready]")
    assert violations(page) == []
    page.set_input_files("#file", upload(b"nonsense"))
    page.wait_for_selector("#alert:not([hidden])")
    page.evaluate("document.getElementById('card-key').hidden = false")
    page.click("summary")
    assert violations(page) == []
    page.set_input_files("#file", upload(pair))
    page.wait_for_selector("#face-list li:nth-child(2)")
    page.click("#face-list li:nth-child(2) button")
    assert violations(page) == []
    page.fill("#password", "p")
    page.click("#anonymize")
    page.wait_for_selector("#tiles li:nth-child(2)")
    page.wait_for_selector("#veil", state="hidden")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # A finger needs 24 CSS pixels (WCAG 2.2, 2.5.8).
    small = page.evaluate(
        """[...document.querySelectorAll('button, input, select, a[href], summary')]
        .filter((e) => e.checkVisibility() && !e.closest('#split, #boxes, .skip, footer') && e.type !== 'checkbox')
        .filter((e) => e.getBoundingClientRect().height < 23.5)
        .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert small == []
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    brightness = [sum(int(v) for v in c.removeprefix("rgb(").rstrip(")").split(",")) for c in (ground, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    context.close()


def test_every_control_has_a_name_and_is_reached_by_keyboard(page: Any, astronaut: bytes) -> None:
    anonymize(page, astronaut, "p")
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, select, a[href], summary')]
        .filter((e) => e.checkVisibility())
        .filter((e) => !(e.innerText?.trim() || e.getAttribute('aria-label') || e.labels?.length))
        .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {
        "mode-anonymize",
        "file",
        "password",
        "anonymize",
        "password-recover",
        "recover",
        "split",
        "save",
        "zoom",
    } <= reached
    # Focus goes as one reads: never from a control to one above it in the document's order.
    order = page.evaluate(
        """[...document.querySelectorAll('#alert, #card-key, #card-photo, .stage, #card-anonymize, #card-recover')]
        .map((e) => e.id || 'stage')"""
    )
    assert order == ["alert", "card-key", "card-photo", "stage", "card-anonymize", "card-recover"]

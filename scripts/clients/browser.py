"""Does the page work in a real browser? It wants a key, takes a document, answers, shows the mosaic, cancels a request, fits on a
narrow screen, and says nothing in the console.

usage: browser.py CHROMIUM SHOTS TEXT [WORDS...]   address, key and model as for openai_sdk.py

  CHROMIUM   the browser
  SHOTS      a folder for pictures of the page
  TEXT       a file with a text of some thousand tokens
"""

import os
import sys
import threading
import time

from playwright.sync_api import sync_playwright

from checks import BASE, KEY, ask, check, run, wait_for

CHROMIUM, SHOTS, TEXT = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)
os.makedirs(SHOTS, exist_ok=True)

play = sync_playwright().start()
browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
page = browser.new_page(viewport={"width": 1200, "height": 1000})
said = []
page.on("console", lambda message: said.append(f"{message.type}: {message.text} {message.location.get('url', '')}"))
page.on("pageerror", lambda error: said.append(str(error)))
page.on("requestfailed", lambda request: said.append(f"{request.url}: {request.failure}"))


def shot(name):
    page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def text(selector):
    return page.inner_text(selector)


@check("the page asks for a key where the server wants one")
def _():
    page.goto(BASE + "/")
    page.wait_for_selector("#key-dialog[open]", timeout=10_000)
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    wait_for("figures", lambda: "run" in text("#state"), 10)
    # The first question was asked without a key.
    refused = [line for line in said if "401" in line]
    said[:] = [line for line in said if "401" not in line]
    return f"{len(refused)} refusals before it"


@check("a document is answered, with the bill of what that took")
def _():
    with open(TEXT) as file:
        page.fill("#document", file.read()[:12_000])
    page.fill("#most", "16")
    page.select_option("#ratio", "layered:8")
    page.click("#send")
    wait_for("an answer", lambda: page.is_enabled("#send") and text("#answer"), 120)
    assert "less" in text("#bill"), text("#bill")
    return text("#bill")


@check("the mosaic of somebody else's answer shows and changes, and tells of a part by keyboard and by pointer; then it is cancelled")
def _():
    words = "Tell a very long story of a whale, a ship and its captain. " * 50
    body = {"prompt": words, "max_tokens": 6000, "ignore_eos": True, "kv": {"format": "packed"}}
    got = []
    asks = threading.Thread(target=lambda: got.append(ask("POST", "/v1/completions", body)))
    asks.start()

    def source():
        return page.locator("#source option", has_text="packed")

    wait_for("its mosaic to choose from", lambda: source().count() == 1, 60)
    page.select_option("#source", source().get_attribute("value"))
    wait_for("a mosaic", lambda: "packed" in text("#mosaic-figures"), 30)
    before = text("#mosaic-figures")
    page.focus("#mosaic")
    for key in ["ArrowRight", "ArrowRight", "ArrowDown"]:
        page.keyboard.press(key)
    by_keyboard = text("#mosaic-part")
    assert all(words in by_keyboard for words in ["Layer 0", "bits a scalar", "read at a step"]), by_keyboard
    page.hover("#mosaic", position={"x": 400, "y": 100})
    wait_for("another part", lambda: text("#mosaic-part") != by_keyboard, 10)
    wait_for("the mosaic to change", lambda: text("#mosaic-figures") != before, 30)
    shot("mosaic")
    page.click("#requests tbody button")
    asks.join(60)
    status, _, answer = got[0]
    assert (status, answer["error"]["code"]) == (409, "cancelled"), got
    wait_for("an empty table", lambda: page.locator("#requests tbody tr").count() == 0, 30)
    return f"{before}, then {text('#mosaic-figures')}"


@check("the mosaic of a layered answer tells which tokens a page has")
def _():
    with open(TEXT) as file:
        words = file.read()[:16_000]
    # Both together fit in the model's 8,192 tokens.
    body = {"prompt": words, "max_tokens": 3500, "ignore_eos": True, "kv": {"format": "layered:8"}}
    got = []
    asks = threading.Thread(target=lambda: got.append(ask("POST", "/v1/completions", body)))
    asks.start()

    def source():
        return page.locator("#source option", has_text="layered").filter(has_not_text="as it was")

    wait_for("its mosaic to choose from", lambda: source().count() == 1, 120)
    page.select_option("#source", source().get_attribute("value"))
    wait_for("a mosaic", lambda: "layered" in text("#mosaic-figures"), 30)
    page.hover("#mosaic", position={"x": 200, "y": 100})
    wait_for("the tokens of a page", lambda: len(text("#mosaic-text")) > 100 and " · " in text("#mosaic-text"), 20)
    part, tokens = text("#mosaic-part"), text("#mosaic-text")
    assert "prompt: channels" in part, part
    pieces = [piece for piece in tokens.split(" … ")[0].split(" · ") if len(piece) > 3]
    assert len(pieces) > 1 and all(piece in words for piece in pieces[:-1]), pieces
    shot("layered")
    page.click("#requests tbody button")
    asks.join(60)
    status, _, answer = got[0]
    assert (status, answer["error"]["code"]) == (409, "cancelled"), got
    return f"{part}: {tokens[:80]!r}"


@check("the sliders say what would fit")
def _():
    before = text("#if-says")
    page.focus("#if-ratio")
    page.keyboard.press("ArrowRight")
    assert text("#if-says") != before
    return text("#if-says")


@check("it fits on a narrow screen, in the dark too")
def _():
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 800})
    time.sleep(1.5)
    shot("narrow")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360, f"{width} pixels wide"


@check("the console is silent")
def _():
    # An answer may end between two looks.
    wrong = [line for line in said if not ("404" in line and "/v1/kv/mosaic/" in line)]
    assert not wrong, wrong


run()

"""The page in a real browser, with the real server of the pocket model behind it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from mmtok_bench.page.command import content_of
from mmtok_bench.page.served import RunningServer
from mmtok_bench.server import cpu_environment
from mmtok_deploy.photographs import photograph
from tests.bench.browser import (
    LEAST_CONTRAST,
    as_before,
    ask,
    contrast,
    luminance,
    narrow_to,
    needs_browser,
    open_browser,
    prefer,
)
from tests.preloaded_server import Child, Templates

pytestmark = [needs_browser, pytest.mark.slow]

LINK = "#picture=scene-1&question=Where+is+the+green+square%3F&budget=49&method=mmtok"
# Which patches are as clear as the picture, at a place of each that no number covers.
CLEAR = """
const done = arguments[1];
const canvas = document.querySelectorAll("canvas")[arguments[0]];
const image = new Image();
image.src = `api/pictures/${new URLSearchParams(location.hash.slice(1)).get("picture")}/seen.jpg`;
image.decode().then(() => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height);
  copy.getContext("2d").drawImage(image, 0, 0, copy.width, copy.height);
  const pixel = (each, x, y) => [...each.getContext("2d").getImageData(x, y, 1, 1).data].join();
  const clear = [];
  for (let token = 0; token < 196; token++) {
    const x = Math.floor(((token % 14) + 0.78) * canvas.width / 14);
    const y = Math.floor((Math.floor(token / 14) + 0.78) * canvas.height / 14);
    if (pixel(canvas, x, y) === pixel(copy, x, y)) clear.push(token);
  }
  done(clear);
});
"""
DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], arguments[1], {type: "image/png"}));
document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""
# Every text that is to be seen, with the colours of text and background.
TEXTS = """[...document.querySelectorAll("body *")].filter((element) =>
    element.checkVisibility({visibilityProperty: true})
    && !element.closest(".visually-hidden, canvas, :disabled, option")
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())).map((element) => {
      let behind = element;
      while (behind && getComputedStyle(behind).backgroundColor.startsWith("rgba(")) behind = behind.parentElement;
      return [element.textContent.trim().slice(0, 40), getComputedStyle(element).color,
              getComputedStyle(behind ?? document.body).backgroundColor];
    })"""


class Program:
    """`mmtok demo --page`, run as a user runs it, with SGLang imported already if there are templates."""

    def __init__(self, folder: Path, templates: Templates | None) -> None:
        # A shell's background jobs ignore SIGINT, and hand that down.
        program = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from mmtok_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        arguments = ["-c", program, "demo", "--page", "--port=0", f"--folder={folder}"]
        environment = {**os.environ, "COLUMNS": "200"}
        read, written = os.pipe()
        self.process: subprocess.Popen[bytes] | Child
        if templates is None:
            self.process = subprocess.Popen([sys.executable, *arguments], stdout=written, env=environment)
        else:
            self.process = templates.of(cpu_environment()).start(
                arguments, environment | cpu_environment(), written, errors_fd=2
            )
        os.close(written)
        self.output = open(read, encoding="utf-8")  # noqa: SIM115
        said = self.output.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found is not None, said
        self.url = found[0]

    def interrupt(self) -> None:
        """Sends what Ctrl-C sends."""
        os.kill(self.process.pid, signal.SIGINT)

    def servers(self) -> list[psutil.Process]:
        """Returns the processes of the SGLang server, which has a session of its own."""
        every = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in every if os.getsid(each.pid) != os.getsid(self.process.pid)]

    def server_url(self) -> str:
        (port,) = {
            argument.removeprefix("--port=")
            for process in self.servers()
            for argument in process.cmdline()
            if argument.startswith("--port=")
        }
        return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, templates: Templates | None) -> Iterator[Program]:
    program = Program(tmp_path_factory.mktemp("demo"), templates)
    try:
        yield program
    finally:
        if program.process.returncode is None:
            program.interrupt()
            program.process.wait(60)
        program.output.close()


@pytest.fixture(scope="module")
def opened() -> Iterator[webdriver.Chrome]:
    browser = open_browser()
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture
def browser(opened: webdriver.Chrome, program: Program) -> Iterator[webdriver.Chrome]:
    """Returns the browser with the page open in its one tab; at its end nothing was asked of another address.

    Nothing that the page does is refused by its Content-Security-Policy either.
    """
    opened.get_log("browser"), opened.get_log("performance")
    opened.get("about:blank")
    open_page(opened, program.url + LINK)
    yield opened
    as_before(opened)
    for extra in opened.window_handles[1:]:
        opened.switch_to.window(extra)
        opened.close()
    opened.switch_to.window(opened.window_handles[0])
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith((program.url, "about:"))} == set()
    assert [entry for entry in opened.get_log("browser") if "Content Security Policy" in entry["message"]] == []


def open_page(browser: webdriver.Chrome, url: str, kept: int = 49) -> None:
    browser.get(url)
    wait_for(browser, f"document.querySelector('canvas')?.dataset.kept === '{kept}'")


def wait_for(browser: webdriver.Chrome, condition: str, timeout_s: float = 30) -> None:
    WebDriverWait(browser, timeout_s).until(lambda _: ask(browser, condition), condition)


def wait_until_ready(browser: webdriver.Chrome) -> None:
    wait_for(browser, "document.body.className === 'ready'", 240)


def clear_patches(browser: webdriver.Chrome, pane: int = 0) -> set[int]:
    return set(browser.execute_async_script(CLEAR, pane))


def wait_for_patches(browser: webdriver.Chrome, expected: list[int], pane: int = 0) -> None:
    WebDriverWait(browser, 10).until(lambda _: clear_patches(browser, pane) == set(expected))


def selected(browser: webdriver.Chrome, **asked: Any) -> Any:
    script = """const done = arguments[1]; fetch("api/selection", {method: "POST", body: JSON.stringify(arguments[0]),
        headers: {"Content-Type": "application/json"}}).then((answer) => answer.json()).then(done)"""
    body = {"picture": "scene-1", "question": "Where is the green square?", "method": "mmtok", **asked}
    return browser.execute_async_script(script, body)


def drop(browser: webdriver.Chrome, data: bytes, name: str) -> None:
    browser.execute_script(DROP, base64.b64encode(data).decode(), name)


def cards(browser: webdriver.Chrome) -> list[dict[str, Any]]:
    """Returns the answers when all are there."""
    wait_for(
        browser, "document.querySelectorAll('.card').length > 1 && !document.querySelector('.card[aria-busy]')", 120
    )
    found: list[dict[str, Any]] = ask(
        browser,
        """[...document.querySelectorAll(".card")].map((card) => ({
            title: card.querySelector("h3").textContent, answer: card.querySelector(".answer").textContent,
            note: card.querySelector(".note").textContent,
            facts: Object.fromEntries([...card.querySelectorAll("dt")].map((each) =>
                [each.textContent, each.nextElementSibling.textContent]))}))""",
    )
    return found


def test_patches_follow_the_slider_without_a_request(browser: webdriver.Chrome) -> None:
    order = selected(browser)["order"]
    assert clear_patches(browser) == set(order[:49])
    asked = "performance.getEntriesByType('resource').filter((each) => each.name.includes('api/selection')).length"
    before = ask(browser, asked)
    slider = browser.find_element(By.ID, "budget")
    slider.send_keys(Keys.HOME)
    shown = []
    for budget in range(1, 6):
        assert clear_patches(browser) == set(order[:budget])
        shown.append(browser.find_element(By.CSS_SELECTOR, "figcaption").text)
        slider.send_keys(Keys.ARROW_RIGHT)
    assert shown[0].startswith("1 of 196 image tokens kept, ")
    covered = [float(re.search(r"([\d.]+)% covered", each)[1]) for each in shown]  # type: ignore[index]
    assert covered == sorted(covered)
    slider.send_keys(Keys.END)
    assert clear_patches(browser) == set(range(196))
    assert browser.find_element(By.CSS_SELECTOR, "figcaption").text == "196 of 196 image tokens kept, 100.0% covered"
    assert ask(browser, asked) == before
    wait_for(browser, "location.hash.includes('budget=all')")


def test_a_method_that_is_not_nested_is_asked_for_each_budget(browser: webdriver.Chrome) -> None:
    browser.find_element(By.CSS_SELECTOR, "#method-0 option[value=dart]").click()
    slider = browser.find_element(By.ID, "budget")
    for budget in (50, 51):
        slider.send_keys(Keys.ARROW_RIGHT)
        order = selected(browser, method="dart", budget=budget)["order"]
        wait_for_patches(browser, order)
    assert not set(selected(browser, method="dart", budget=10)["order"]) <= set(order[:10])


def test_a_link_opens_what_was_chosen_in_two_panes(browser: webdriver.Chrome, program: Program) -> None:
    browser.find_element(By.CSS_SELECTOR, "[value=coffee]").click()
    wait_for(browser, "document.querySelector('canvas').ariaLabel.startsWith('Coffee: 49 of 196')")
    question = browser.find_element(By.ID, "question")
    question.clear()
    question.send_keys("Is there a red & white circle?")
    browser.find_element(By.CSS_SELECTOR, "#method-1 option[value=divprune]").click()
    browser.find_element(By.ID, "budget").send_keys(Keys.ARROW_LEFT)
    wait_for(browser, "location.hash.includes('compare=divprune') && location.hash.includes('budget=48')")
    wait_for(browser, "location.hash.includes('white+circle')")
    link = browser.current_url
    browser.switch_to.new_window("tab")
    browser.get(link)
    wait_for(browser, "document.querySelectorAll('canvas').length === 2")
    wait_for(browser, "[...document.querySelectorAll('canvas')].every((each) => each.dataset.kept === '48')")
    for pane, method in enumerate(("mmtok", "divprune")):
        asked = {"picture": "coffee", "question": "Is there a red & white circle?", "method": method}
        wait_for_patches(browser, selected(browser, **asked)["order"][:48], pane)
    assert ask(browser, "document.querySelector('[name=picture]:checked').value") == "coffee"
    assert ask(browser, "document.getElementById('question').value") == "Is there a red & white circle?"


def test_dropped_files(browser: webdriver.Chrome, program: Program) -> None:
    drop(browser, b"no picture at all", "broken.png")
    wait_for(browser, "document.getElementById('picture-message')?.textContent.startsWith('broken.png: ')")
    assert "expected one of PNG" in browser.find_element(By.ID, "picture-message").text
    assert browser.find_element(By.CSS_SELECTOR, "[name=picture]:checked").get_attribute("value") == "scene-1"
    file = io.BytesIO()
    photograph("chelsea").save(file, format="PNG")
    drop(browser, file.getvalue(), "cat.png")
    wait_for(browser, "location.hash.includes('picture=dropped-')")
    link = browser.current_url
    chosen = browser.find_element(By.CSS_SELECTOR, "[name=picture]:checked")
    assert chosen.find_element(By.XPATH, "..").text == "cat.png"
    browser.switch_to.new_window("tab")
    open_page(browser, link)
    browser.get("about:blank")
    browser.get(re.sub("dropped-[^&]+", "dropped-0", link))
    wait_for(browser, "document.getElementById('picture-message')?.textContent.startsWith('This picture is gone')")


def test_answers_arrive_and_the_server_kept_what_is_drawn(browser: webdriver.Chrome) -> None:
    wait_until_ready(browser)
    browser.find_element(By.CSS_SELECTOR, "#method-1 option[value=even]").click()
    browser.find_element(By.ID, "question").send_keys(Keys.ENTER)
    unpruned, pruned, even = cards(browser)
    assert [each["title"] for each in (unpruned, pruned, even)] == ["Unpruned", "mmtok, 49 tokens", "even, 49 tokens"]
    assert "The right answer is: bottom right." in browser.find_element(By.ID, "asked").text
    assert unpruned["answer"] == pruned["answer"] == "bottom right"
    for card, tokens in ((unpruned, 196), (pruned, 49), (even, 49)):
        assert card["facts"]["of the image"] == str(tokens)
        assert float(card["facts"]["time to first token"].removesuffix(" ms")) > 0
        # No cache had any of it.
        assert "of them from a cache" not in card["facts"]
        assert card["note"] == ""
    assert pruned["facts"]["image tokens in"] == "196"
    if "MMTOK_SCREENSHOT" in os.environ:
        browser.save_screenshot(os.environ["MMTOK_SCREENSHOT"])
    # What the server says is what the page computed.
    drawn = browser.find_element(By.CSS_SELECTOR, "figcaption").text
    assert drawn == f"49 of 196 image tokens kept, {pruned['facts']['covered, as the server says']} covered"


def test_a_running_server_of_the_pocket_model_is_known(browser: webdriver.Chrome, program: Program) -> None:
    wait_until_ready(browser)
    running = RunningServer(program.server_url())
    assert running.state().name == "ready"
    content = content_of(running.url, running.info, None)
    assert content.patches is not None
    found = content.patches.select(content.pictures.get("scene-1"), "Where is the green square?", "mmtok", None)
    assert found["order"] == selected(browser)["order"]


def test_two_tabs_ask_at_once(browser: webdriver.Chrome, program: Program) -> None:
    wait_until_ready(browser)
    browser.switch_to.new_window("tab")
    open_page(browser, program.url + LINK.replace("green+square", "blue+triangle"))
    wait_until_ready(browser)
    first, second = browser.window_handles
    for tab in (first, second):
        browser.switch_to.window(tab)
        browser.execute_script("document.getElementById('ask').click()")
    for tab, answer in ((first, "bottom right"), (second, "top left")):
        browser.switch_to.window(tab)
        assert [each["answer"] for each in cards(browser)] == [answer, answer]
    # One that goes away while it asks keeps no other waiting.
    browser.execute_script("document.getElementById('ask').click(); location.reload()")
    wait_for(browser, "document.querySelectorAll('.card').length === 0")
    wait_until_ready(browser)
    browser.find_element(By.ID, "ask").click()
    assert cards(browser)[0]["answer"] == "top left"


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(browser: webdriver.Chrome) -> None:
    wait_until_ready(browser)
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {"button", "textbox", "slider", "combobox", "radio", "image", "progressbar", "group", "region", "form"}
    found = [
        (each["role"]["value"], each.get("name", {}).get("value", ""))
        for each in nodes
        if not each.get("ignored") and each["role"]["value"] in named
    ]
    assert [role for role, name in found if not name.strip()] == []
    assert {"button", "textbox", "slider", "combobox", "radio", "image", "form"} <= {role for role, _ in found}
    said = browser.find_element(By.ID, "budget").get_attribute("aria-valuetext") or ""
    assert re.fullmatch(r"49 of 196 image tokens, 25%, [\d.]+% covered", said)
    reached = []
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        focused = ask(
            browser,
            """[document.activeElement.id || document.activeElement.name,
                getComputedStyle(document.activeElement.matches("[type=radio], [type=file]")
                    ? document.activeElement.nextElementSibling : document.activeElement).outlineStyle]""",
        )
        if focused[0]:
            reached.append(tuple(focused))
    assert {"link", "picture", "file", "question", "ask", "budget", "play", "method-0", "method-1"} <= {
        name for name, _ in reached
    }
    assert {name for name, outline in reached if outline == "none"} == set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: webdriver.Chrome, scheme: str) -> None:
    prefer(browser, scheme)
    texts = ask(browser, TEXTS)
    assert len(texts) > 30
    assert (luminance(ask(browser, "getComputedStyle(document.body).backgroundColor")) < 0.1) is (scheme == "dark")
    faint = [
        (text, ink, paper) for text, ink, paper in texts if contrast(luminance(ink), luminance(paper)) < LEAST_CONTRAST
    ]
    assert faint == []


def test_a_phone_scrolls_down_alone(browser: webdriver.Chrome) -> None:
    narrow_to(browser, 360)
    browser.find_element(By.CSS_SELECTOR, "#method-1 option[value=even]").click()
    wait_for(browser, "innerWidth === 360 && document.querySelectorAll('canvas').length === 2")
    assert ask(browser, "document.documentElement.scrollWidth") == 360
    small = "[...document.querySelectorAll('button, select, [type=range]')].filter((each) => each.offsetHeight"
    assert ask(browser, f"{small} && each.offsetHeight < 24).length") == 0


def test_a_server_that_is_killed_is_told_and_restarted(browser: webdriver.Chrome, program: Program) -> None:
    wait_until_ready(browser)
    for process in program.servers():
        process.kill()
    wait_for(browser, "!document.getElementById('trouble').hidden")
    trouble = browser.find_element(By.ID, "trouble")
    assert trouble.get_attribute("role") == "alert"
    assert "The server ended" in trouble.text
    assert not browser.find_element(By.ID, "ask").is_enabled()
    # Patches are the page's own: they go on.
    browser.find_element(By.ID, "budget").send_keys(Keys.HOME)
    assert len(clear_patches(browser)) == 1
    browser.find_element(By.ID, "restart").click()
    wait_for(browser, "document.body.className === 'starting' && !document.getElementById('starting').hidden")
    wait_until_ready(browser)
    assert not trouble.is_displayed()
    browser.find_element(By.ID, "ask").click()
    assert cards(browser)[0]["answer"] == "bottom right"


def test_ctrl_c_ends_the_server_and_the_page_says_so(browser: webdriver.Chrome, program: Program) -> None:
    servers = program.servers()
    assert servers
    program.interrupt()
    assert program.process.wait(60) == 130
    assert psutil.wait_procs(servers, timeout=10)[1] == []
    wait_for(browser, "document.getElementById('trouble-text').textContent.includes('mmtok demo --page again')")
    assert not browser.find_element(By.ID, "restart").is_displayed()

"""Chromium, without a screen, for the tests of pages."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

__all__ = [
    "LEAST_CONTRAST",
    "as_before",
    "ask",
    "contrast",
    "luminance",
    "narrow_to",
    "needs_browser",
    "open_browser",
    "prefer",
]

LEAST_CONTRAST = 4.5
"""What WCAG 2.2 asks of text."""

_BROWSER, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1000"),
)

needs_browser = pytest.mark.skipif(
    _BROWSER is None or _DRIVER is None,
    reason="no chromium and chromedriver here: apt-get install chromium chromium-driver",
)


def open_browser() -> webdriver.Chrome:
    """Returns a browser that notes what its console says and what it asks for; `quit` ends it."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(_BROWSER)
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(str(_DRIVER)))


def ask(browser: webdriver.Chrome, script: str) -> Any:
    """Returns the value of an expression on the page."""
    return browser.execute_script(f"return {script}")


def narrow_to(browser: webdriver.Chrome, width_px: int) -> None:
    """Gives the page a phone's screen."""
    metrics = {"width": width_px, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(browser: webdriver.Chrome, scheme: str) -> None:
    """Has the page shown in a colour scheme, "light" or "dark"."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def as_before(browser: webdriver.Chrome) -> None:
    """Takes back what `narrow_to` and `prefer` did."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(luminance: float, other: float) -> float:
    """Returns the contrast ratio of two luminances; source: WCAG 2.2."""
    return (max(luminance, other) + 0.05) / (min(luminance, other) + 0.05)


def luminance(colour: str) -> float:
    """Returns the relative luminance of "rgb(r, g, b)"; source: WCAG 2.2."""
    channels = [int(each) / 255 for each in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

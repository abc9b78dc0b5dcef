"""The page in a browser: it draws, filters, fits a phone, and complains of nothing."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from regraft_bench.report.page import page
from regraft_bench.studies import STUDIES, study

webdriver = pytest.importorskip("selenium.webdriver")
RESULTS = Path(__file__).parents[2] / "results"
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with its chromedriver here")


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page(RESULTS, [study(name) for name in STUDIES]), encoding="utf-8")
    assert path.stat().st_size < 2_000_000
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "no-first-run",
    ):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def until(browser, words: str) -> None:
    end = time.monotonic() + 60
    while not browser.execute_script(f"return {words}"):
        assert time.monotonic() < end, words
        time.sleep(0.05)


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_draws_and_filters_at_every_width_in_both_schemes(browser, address, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(address)
    until(browser, "document.body.dataset.ready === 'yes'")
    until(browser, "document.querySelectorAll('#leaders svg .mark-symbol path').length > 1")
    browser.execute_script("document.querySelector('.plot[data-figure]').scrollIntoView()")
    until(browser, "document.querySelectorAll('.plot[data-figure] svg .mark-line path').length > 1")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    shown = "[...document.querySelectorAll('tbody tr')].filter(row => !row.hidden).length"
    everything = browser.execute_script(f"return {shown}")
    browser.find_element("id", "filter").send_keys("fgmt")
    until(browser, f"0 < {shown} && {shown} < {everything}")
    assert browser.get_log("browser") == []

"""The page in a browser: it draws, filters, fits a phone, and complains of nothing."""

from __future__ import annotations

import base64
import re
import shutil
import time
from pathlib import Path

import pytest

from regraft_bench.report.page import page
from regraft_bench.report.terms import TERMS
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


def open_page(browser, address: str) -> None:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")
    browser.get(address)
    until(browser, "document.body && document.body.dataset.ready === 'yes'")


def test_a_heading_sorts_by_its_column_up_and_down_with_a_key(browser, address):
    open_page(browser, address + "#fusion-table-6-table-6-methods")
    table = "document.getElementById('fusion-table-6-table-6-methods')"
    assert browser.execute_script(f"return {table}.open"), "an address opens what it leads to"
    heading = browser.find_element("css selector", "#fusion-table-6-table-6-methods th:nth-child(2) button")
    column = f"[...{table}.querySelectorAll('tbody td:nth-child(2)')].map(cell => parseFloat(cell.textContent))"
    for order in (1, -1):
        heading.send_keys("\ue007")  # Enter
        numbers = [x for x in browser.execute_script(f"return {column}") if x is not None]
        assert len(numbers) > 3
        assert numbers == sorted(numbers, reverse=order < 0)


def test_an_address_leads_to_a_scenario_and_a_choice_is_an_address(browser, address):
    open_page(browser, address + "#scenario=transfer: mnist-mlp-512")
    assert browser.execute_script("return document.getElementById('scenario').value") == "transfer: mnist-mlp-512"
    script = "const c = document.getElementById('scenario'); c.selectedIndex = 0; c.dispatchEvent(new Event('change'))"
    browser.execute_script(script)
    assert "scenario=transfer" in browser.execute_script("return location.hash")


def test_a_filter_opens_what_it_finds_hides_empty_sections_and_says_when_nothing_is_left(browser, address):
    open_page(browser, address)
    field = browser.find_element("id", "filter")
    field.send_keys("table-6-methods")
    until(browser, "document.getElementById('fusion-table-6-table-6-methods').checkVisibility()")
    assert not browser.execute_script("return document.getElementById('fast').checkVisibility()")
    field.send_keys(" nothing-like-it")
    until(browser, "document.getElementById('none').checkVisibility()")


def test_the_page_is_short_and_prints_on_thirty_pages_with_all_its_figures(browser, address):
    open_page(browser, address)
    assert browser.execute_script("return document.documentElement.scrollHeight") < 12_000
    browser.set_script_timeout(120)
    browser.execute_async_script("const done = arguments[0]; drawAll().then(() => done(true))")
    plots, drawn = (
        browser.execute_script(f"return document.querySelectorAll('.plot[data-figure]{svg}').length")
        for svg in ("", " > svg, .plot[data-figure] .vega-embed svg")
    )
    assert plots == drawn > 20
    names = "[...document.querySelectorAll('.plot')].every(plot => plot.getAttribute('aria-label').length > 10)"
    assert browser.execute_script(f"return {names}")
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert 1 < len(re.findall(rb"/Type\s*/Page\b", printed)) <= 30


def test_every_term_is_in_the_glossary():
    text = " ".join((RESULTS.parent / "docs" / "glossary.md").read_text(encoding="utf-8").split())
    assert [term for term, meaning in TERMS.items() if f"**{term}**: {meaning}" not in text] == []

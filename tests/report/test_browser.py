"""The page in a real browser: everything is drawn, nothing is asked of the network, nothing overflows."""

import json
import shutil
from functools import partial

import pytest

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)

FLAGS = (
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ),
    *("--disable-background-networking", "--disable-component-update"),
)
VALUES = {
    "cross-entropy": [0.92, 0.925, 0.93],
    "dhkd": [0.93, 0.937, 0.939],
    "<script>alert('x')</script>": [0.91, 0.93, 0.94],
    "an-arm-with-a-very-long-name,temperature=4.0,weight=0.25,hidden=200,dropout=0.1,alignment=all": [
        0.9,
        0.91,
        0.9,
    ],
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(service=webdriver.ChromeService(DRIVER), options=options)
    yield driver
    driver.quit()


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page as a screen of some width and scheme shows it, and wait until its charts are drawn."""
    from selenium.webdriver.support.wait import WebDriverWait

    def open_page(path, width=1600, scheme="light"):
        browser.get("about:blank")
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        emulate(browser, scheme)
        browser.get_log("performance"), browser.get_log("browser")
        browser.get(path.as_uri())
        WebDriverWait(browser, 60).until(
            lambda page: page.execute_script("return document.documentElement.hasAttribute('data-drawn')")
        )
        return browser

    return open_page


def emulate(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def requests(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "blob:", "chrome:", "about:"))]


def luminance(browser, element, style):
    color = browser.execute_script(
        f"return getComputedStyle(document.querySelector({element!r})).{style}.match(/[\\d.]+/g).map(Number)"
    )
    channels = [c / 255 for c in color[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


DRAWN = """
return Object.fromEntries([...document.querySelectorAll('.plot')].map(plot => [plot.id, {
  surface: plot.querySelectorAll('svg.main-svg').length,
  marks: plot.querySelectorAll('.scatterlayer .trace path, .heatmaplayer image').length,
  fits: plot.querySelector('svg.main-svg')?.getBoundingClientRect().width <= plot.clientWidth + 1,
}]))
"""


@pytest.mark.parametrize(("width", "scheme", "other"), [(390, "dark", "light"), (1600, "light", "dark")])
def test_page_is_whole(visit, result_folder, width, scheme, other):
    from selenium.webdriver.support.wait import WebDriverWait

    from coloss.report import write_report

    path = write_report(result_folder(VALUES))
    browser = visit(path, width, scheme)
    check_page(browser, width, scheme)
    find = "return document.querySelector('#curve').data.findLast(t => t.legendgroup === 'arm1').line.color"
    line = partial(browser.execute_script, find)
    colors = {"light": "#2063c4", "dark": "#5688f0"}
    assert line() == colors[scheme]
    emulate(browser, other)
    WebDriverWait(browser, 30).until(lambda _: line() == colors[other])
    check_page(browser, width, other)
    assert requests(browser) == [path.as_uri()]
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def check_page(browser, width, scheme):
    drawn = browser.execute_script(DRAWN)
    assert {"ranking", "curve", "term0", "term1", "heat-arm1", "norms-arm3", "cost"} <= set(drawn)
    for chart, found in drawn.items():
        assert found["surface"] and found["marks"] and found["fits"], (chart, found)
    sizes = "return [document.documentElement.scrollWidth, document.body.scrollWidth, window.innerWidth]"
    assert max(browser.execute_script(sizes)) <= width
    background = luminance(browser, "body", "backgroundColor")
    assert background > 0.8 if scheme == "light" else background < 0.05
    for element in ("h1", ".verdict", "td", "p.note", ".switch button"):
        low, high = sorted([background, luminance(browser, element, "color")])
        assert (high + 0.05) / (low + 0.05) > 4.5, element


def test_switches_and_legend(visit, result_folder):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    from coloss.report import write_report

    browser = visit(write_report(result_folder(VALUES)))
    wait = WebDriverWait(browser, 30)
    title = "return document.querySelector('#term0').layout.xaxis.title.text"
    assert browser.execute_script(title) == "training seconds"
    browser.find_element(By.CSS_SELECTOR, "[data-choice=steps]").click()
    wait.until(lambda page: page.execute_script(title) == "steps")
    lines = "return document.querySelectorAll('#curve .scatterlayer .trace').length"
    before = browser.execute_script(lines)
    button = browser.find_element(By.CSS_SELECTOR, "[data-arm=arm1]")
    button.click()
    wait.until(lambda page: page.execute_script(lines) == before - 2)
    pressed = [
        b.get_attribute("aria-pressed") for b in browser.find_elements(By.CSS_SELECTOR, "[data-arm=arm1]")
    ]
    assert pressed == ["false", "false"]
    button.click()
    wait.until(lambda page: page.execute_script(lines) == before)

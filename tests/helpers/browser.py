"""A headless Chromium that is installed already; nothing is downloaded."""

import shutil
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium():
    """Yield Playwright's browser, or skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and Path("/usr/lib/chromium/chromium").exists():
        found = "/usr/lib/chromium/chromium"
    if found is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page in the browser, with all that it asked for and complained of."""

    def __init__(self, browser, path, width=1400, dark=False, scripts=True, anchor=""):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light",
            java_script_enabled=scripts, accept_downloads=True,
        )  # fmt: skip
        self.page = self.context.new_page()
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"{path.as_uri()}{anchor}")

    def texts(self, selector):
        return [one.strip() for one in self.page.locator(selector).all_inner_texts()]

    def count(self, selector, visible=True):
        found = self.page.locator(selector)
        return found.locator("visible=true").count() if visible else found.count()

    def style(self, selector, name):
        return self.page.locator(selector).first.evaluate(f"one => getComputedStyle(one)['{name}']")


# Contrast of every text with what is painted behind it, as WCAG 2 defines it.
LOWEST_CONTRAST = """() => {
  const rgba = (text) => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    canvas.fillStyle = text; canvas.clearRect(0, 0, 1, 1); canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (one) => one
    ? over(rgba(getComputedStyle(one).backgroundColor), behind(one.parentElement)) : [255, 255, 255, 1];
  const light = (colour) => {
    const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.map((value) => linear(value / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let lowest = [99, ''];
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !one.checkVisibility() || one.closest('svg, script, style')) continue;
    const back = behind(one), ink = over(rgba(getComputedStyle(one).color), back);
    const [low, high] = [light(back), light(ink)].sort((a, b) => a - b);
    const contrast = (high + .05) / (low + .05);
    if (contrast < lowest[0]) lowest = [contrast, `${one.className} ${walker.currentNode.data.trim().slice(0, 40)}`];
  }
  return lowest;
}"""

"""Make docs/figures/page.png, the picture of the page that interact.py --web opens; it needs Chromium (make browser).

python docs/figures/page.py                                    # with example/smollm2, as `make web`
python docs/figures/page.py runs/Nov21_20-57-01_host_model
python docs/figures/page.py --look build/                      # also dark, and 400 pixels wide, into a folder
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent.parent
PICTURE = ROOT / "docs" / "figures" / "page.png"
LINES = ["hello , how are you today ?", "what do you do for a living ?", "do you have any pets ?"]
FLAGS = ["--personality", "i work as a nurse .", "i have two dogs .", "i love to cook .", "--seed", "7",
         "--num_samples", "5", "--rank", "--web", "127.0.0.1:0"]  # fmt: skip


def open_browser(width: int, height: int) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    resize(browser, width, height)
    return browser


def resize(browser: webdriver.Chrome, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def colour(browser: webdriver.Chrome, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    time.sleep(1)  # for the page to change


def visit(browser: webdriver.Chrome, address: str) -> None:
    """Say `LINES`, and unfold the last reply's candidates."""
    browser.get(address)
    wait = WebDriverWait(browser, 120)
    wait.until(lambda _: browser.find_elements("css selector", ".talk .note"))
    for count, line in enumerate(LINES, start=1):
        browser.find_element("css selector", "#message textarea, #message input").send_keys(line, Keys.ENTER)
        wait.until(lambda _, count=count: len(browser.find_elements("css selector", ".talk details")) == count)
    browser.find_elements("css selector", ".talk summary")[-1].click()
    browser.execute_script("const log = document.getElementById('talk'); log.scrollTop = log.scrollHeight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/figures/page.png from a visit to the page.")
    parser.add_argument(
        "checkpoint", nargs="?", default=str(ROOT / "example" / "smollm2"), help="run folder of train.py"
    )
    parser.add_argument("--look", metavar="FOLDER", help="where the page goes in the dark, and 400 pixels wide")
    args = parser.parse_args()
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        sys.exit("page.py: no picture of the page: it needs Chromium and chromedriver; make browser")
    command = [sys.executable, str(ROOT / "interact.py"), "--model_checkpoint", args.checkpoint, *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        browser = open_browser(1000, 720)
        try:
            visit(browser, address)
            colour(browser, "light")
            browser.save_screenshot(str(PICTURE))
            if args.look:
                colour(browser, "dark")
                browser.save_screenshot(str(Path(args.look, "dark.png")))
                resize(browser, 400, 1400)
                colour(browser, "light")
                browser.save_screenshot(str(Path(args.look, "narrow.png")))
        finally:
            browser.quit()
            server.kill()


if __name__ == "__main__":
    main()

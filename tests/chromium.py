"""Headless Chromium for the tests that look at a page; they are skipped where there is none."""

import pathlib
import shutil
import time

import pytest


@pytest.fixture
def browser(tmp_path: pathlib.Path):
    """Keeps the console's messages and the requests made; downloads go to tmp_path/downloads."""
    programs = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
    if not all(programs):
        pytest.skip("no chromium and chromedriver here")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (
        "--headless=new",
        "--no-sandbox",  # refuses to start for root otherwise; it opens pages of ours
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-unsafe-swiftshader",  # WebGL without a GPU
        "--no-first-run",
        "--window-size=1200,1300",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    yield driver
    driver.quit()


def wait_for(something, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := something():
            return found
        time.sleep(0.3)
    raise AssertionError(f"nothing after {seconds} s")

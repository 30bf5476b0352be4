"""Open a page in headless Chromium, if it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def need_browser() -> None:
    """Skip the test if no browser is installed."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: the report is not opened in a browser")


def browse(page: Path, profile: Path, width: int = 1400) -> tuple[str, str]:
    """Open a page; return its DOM after running its scripts, and the console messages."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=20000",
        "--enable-logging=stderr",
        f"--window-size={width},3000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout, "\n".join(said)


def with_script(page: Path, out: Path, script: str) -> Path:
    """Write a page with an additional script at its end, without the policy
    that forbids scripts."""
    start, end = '<meta http-equiv="Content-Security-Policy"', "</body>"
    text = page.read_text()
    before, _, after = text.partition(start)
    before, _, after = (before + after.partition(">")[2]).rpartition(end)
    out.write_text(f"{before}<script>{script}</script>{end}{after}")
    return out

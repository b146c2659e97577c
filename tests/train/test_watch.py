"""Tests for train.watch and `train.report --run`: a run seen from outside, while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store
from tests.support.browser import CHROMIUM, browser
from tests.support.training import Project, stop_in
from tests.train.test_play import REFUSED
from train import serve, watch
from train.report import live
from train.report.__main__ import main as report_main

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


def served(scenario: Callable[[str], Awaitable[None]]) -> None:
    """Run a scenario with the address of the live page of this folder's store."""

    async def run() -> None:
        async with serve.serve(watch.Watch(Store.open(Machine())).app(), 0) as address:
            await asyncio.wait_for(scenario(address), 100)

    asyncio.run(run())


def test_stopped_run_has_a_page_and_an_unknown_one_a_reason(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no run"):
        report_main(["--run", "0"])
    stop_in(monkeypatch, "step", 7)
    (run,) = live.find_runs(Store.open(Machine()))
    assert run.state == "stopped"
    log = run.folder / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 7, "tr')  # being written
    (run.folder / "failed.json").write_text("{}")  # damaged
    report_main(["--run", run.key[:6]])
    page = Path(f"artifacts/run-{run.key[:12]}.html").read_text()
    assert "<b>6</b><span>of 12 steps" in page
    assert "<script" not in page
    with pytest.raises(UserError, match="--run zz"):
        report_main(["--run", "zz"])

    async def scenario(address: str) -> None:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{address}run", params={"run": "zz"}) as answer:
                assert answer.status == 404
            for headers, _, status, _ in REFUSED[:3]:
                async with session.get(f"{address}run", headers=headers) as answer:
                    assert answer.status == status
            async with session.get(f"{address}run") as answer:
                seen = {"seen": answer.headers["ETag"]}
            async with session.get(f"{address}run", params=seen) as answer:
                assert answer.status == 204

    served(scenario)


@pytest.mark.slow
@needs_chromium
def test_page_follows_a_run_from_start_to_end(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 200)
    project.write(train={"steps": 120, "val_every": 40, "log_every": 1})

    async def scenario(address: str) -> None:
        async with browser() as page:
            await page.open(address)
            await page.until("document.querySelector('#status').textContent !== ''")
            await page.js("window.unloaded = false")
            process = project.start("train")
            await page.until("document.title.endsWith('running')")
            await page.until("document.querySelectorAll('#run svg').length > 3")
            await page.until("document.title.endsWith('finished')")
            assert await page.js("window.unloaded") is False  # the page was never reloaded
            tile = "document.querySelector('.tile b').textContent"
            assert await page.js(tile) == "120"
            assert "step 120" in await page.js("document.querySelector('.steps').textContent")
            for width, height in ((1280, 900), (390, 844)):
                await page.screen(width, height)
                await page.until(f"innerWidth === {width}")
                assert await page.js("document.documentElement.scrollWidth") <= width
            assert [c for c in page.complaints if "404" not in c] == []
            assert process.wait(30) == 0

    served(scenario)

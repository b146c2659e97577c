"""Tests for train.watch and `train.report --run`: a run seen from outside, while it runs."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store
from tests.support.browser import CHROMIUM, browser
from tests.support.training import Project, stop_in
from tests.train.test_play import REFUSED
from train import serve, watch
from train.report import live
from train.report.__main__ import main as report_main
from train.report.run_log import LogReader

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
            for headers, _, status, _ in REFUSED[:4]:
                async with session.get(f"{address}run", headers=headers) as answer:
                    assert answer.status == status
            async with session.get(f"{address}run") as answer:
                seen = {"seen": answer.headers["ETag"]}
            async with session.get(f"{address}run", params=seen) as answer:
                assert answer.status == 204

    served(scenario)


def test_first_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(first: int) -> None:
        async with serve.serve(web.Application(), None) as address:
            port = int(address.rstrip("/").rpartition(":")[2])
            assert first < port < first + serve.PORTS
        monkeypatch.setattr(serve, "PORTS", 1)
        with pytest.raises(UserError, match=f"--port {first}"):
            async with serve.serve(web.Application(), None):
                pass

    with socket.create_server((serve.HOST, 0)) as taken:
        monkeypatch.setattr(serve, "PORT", taken.getsockname()[1])
        asyncio.run(run(serve.PORT))


def add_run(key: str, log: str) -> Path:
    folder = Path(".work/runs", key)
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(log)
    return folder


def test_damage_costs_its_part_of_a_page(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        '{"step": 1, "train/loss": 3.5, "grad_norm": 1.0, "tokens_per_second": 9.0, "seconds": 2}',
        '{"step": 2, "train/loss": 1e999, "grad_norm": 1e999, "tokens_per_second": 1e999}',
        '{"step": 3, "train/loss": [1, 2]}',
        '{"step": 3, "sample": 5}',
        '{"step": 3, "sample": [-1, 99999]}',
        '{"step": 3, "sample": [464, 661]}',
        f'{{"step": {10**400}, "train/loss": 1.0}}',
        '{"step": -4, "train/loss": 1.0}',
        f'{{"step": 3, "spike": {10**400}}}',
        '{"step": 4, "train/lo',
    ]
    folder = add_run("aa", "\n".join(lines))
    (folder / "starts.jsonl").write_text('{"step": 3}\n')
    (folder / "run.json").write_text('{"train": [1], "model": [2]}')
    pipe, other = add_run("bb", ""), add_run("cc", "")
    for path in (pipe / "log.jsonl", other / "log.jsonl"):
        path.unlink()
    os.mkfifo(pipe / "log.jsonl")  # opening it would block
    (other / "log.jsonl").mkdir()
    store, glob = Store.open(Machine()), Path.glob
    monkeypatch.setattr(Path, "glob", lambda *args: [*glob(*args), Path("pruned/log.jsonl")])
    runs = live.find_runs(store)
    assert [run.key for run in runs] == ["aa"]
    body = live.render_body(runs[0], runs)
    assert "<b>3</b><span>steps" in body
    assert "<b>3.5000</b>" in body
    assert body.count("<dt>") == 1
    for name in ("starts.jsonl", "run.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert "<b>3.5000</b>" in live.render_body(runs[0], runs)
    assert capsys.readouterr().err == ""  # the page is drawn every few seconds
    (folder / "log.jsonl").unlink()
    with pytest.raises(UserError, match=r"aa/log\.jsonl"):
        live.render_body(runs[0], runs)


def test_pages_are_drawn_one_at_a_time_with_rests(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = add_run("aa", "") / "log.jsonl"
    drawn: list[float] = []

    def draw(run: live.Found, runs: list[live.Found], reader: LogReader) -> str:
        drawn.append(time.monotonic())
        if len(drawn) == 3:
            raise PermissionError(13, "Permission denied", "log.jsonl")
        time.sleep(0.1)
        return "page"

    monkeypatch.setattr(live, "render_body", draw)

    async def scenario(address: str) -> None:
        async def ask(seen: str, timeout: float = 10) -> tuple[int, str]:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(timeout)) as session,
                session.get(f"{address}run", params={"seen": seen}) as answer,
            ):
                return answer.status, answer.headers.get("ETag", "")

        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await ask("", 0.02)
        status, seen = await ask("")
        assert (status, len(drawn)) == (200, 1)  # the page that the first one has left
        log.write_text("a line")
        while (await ask(seen))[0] == 204:
            pass
        assert len(drawn) == 2
        assert drawn[1] - drawn[0] > 0.1 * (1 + watch.REST)
        log.write_text("two lines")
        while (await ask(""))[0] == 200:
            pass
        assert len(drawn) == 3

    served(scenario)


def test_run_that_is_removed_while_it_is_watched(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "REST", 0)
    line = '{"step": 1, "train/loss": 3.5}\n'

    async def scenario(address: str) -> None:
        async with aiohttp.ClientSession() as session:

            async def ask(**query: str) -> tuple[int, str]:
                async with session.get(f"{address}run", params=query) as answer:
                    return answer.status, await answer.text()

            folder = add_run("aa", line)
            add_run("bb", line)
            assert "<b>3.5000</b>" in (await ask(run="aa"))[1]
            with open(folder / "log.jsonl", "a") as log:
                log.write(line.replace("3.5", "2.5"))
            assert "<b>2.5000</b>" in (await ask(run="aa"))[1]
            shutil.rmtree(folder)
            status, reason = await ask(run="aa")
            assert (status, reason.count("\n")) == (404, 0)
            assert "--run aa" in reason
            status, page = await ask()
            assert (status, "?run=aa" in page) == (200, False)
            add_run("aa", line.replace("3.5", "1.5"))
            assert "<b>1.5000</b>" in (await ask(run="aa"))[1]
            shutil.rmtree(".work/runs")
            assert (await ask())[0] == 404

    served(scenario)


@pytest.mark.slow
@needs_chromium
def test_page_follows_a_run_from_start_to_end(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 200)
    monkeypatch.setattr(watch, "REST", 0)
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

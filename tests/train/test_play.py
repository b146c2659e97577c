"""Of train.play: the page in a real browser, and what the server refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from model import GPT, GPTConfig
from pipeline.format import tokenizer
from pipeline.runtime.errors import UserError
from tests.support.browser import CHROMIUM, Page, browser
from train.play import MOST_TOKENS, MOST_WAITING, Playground, Wish, main, read_model, served, steps

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=64)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return GPT.initialised(CONFIG, seed=3)


def text_of(gpt: GPT, prompt: str, n: int, **settings: Any) -> str:
    """What the model itself writes."""
    row = [tokenizer.EOT, *tokenizer.encode(prompt)]
    (tokens,) = gpt.generate([row], n, **settings)
    return tokenizer.decode([t for t in tokens[len(row) :] if t != tokenizer.EOT])


def test_steps_are_what_the_model_generates(gpt: GPT) -> None:
    settings: dict[str, Any] = {"temperature": 2.0, "top_k": 9, "top_p": 0.5, "seed": 4}
    events = list(steps(gpt, Wish(prompt="Once", tokens=20, **settings)))
    assert "".join(event["text"] for event in events) == text_of(gpt, "Once", 20, **settings)
    for event in events:
        ps = [p for _, p in event["likeliest"]]
        assert ps == sorted(ps, reverse=True)
        assert 0 < event["probability"] <= ps[0] < 1
    greedy = next(steps(gpt, Wish(temperature=0)))
    assert [greedy["token"], greedy["probability"]] == list(greedy["likeliest"][0])


def test_unfinished_characters_wait_for_the_rest() -> None:
    odd = GPT.initialised(CONFIG, seed=3)
    pieces = [rank for piece, rank in tokenizer.ranks().items() if len(piece) == 1 and piece > b"~"]
    with torch.no_grad():
        odd.wte.weight[pieces] *= 50  # so that bytes of longer characters are likely
    events = list(steps(odd, Wish(tokens=25, seed=1, temperature=1.0)))
    assert "".join(event["text"] for event in events) == text_of(odd, "", 25, seed=1)
    assert any(not event["text"] for event in events)


def play(gpt: GPT, scenario: Callable[[str, list[str]], Awaitable[None]]) -> None:
    """Runs a scenario against a served playground: its address, and what it said."""

    async def run() -> None:
        said: list[str] = []
        async with served(Playground(gpt, "a test", said.append), 0) as address:
            await asyncio.wait_for(scenario(address, said), 90)

    asyncio.run(run())


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not happen")


@needs_chromium
def test_the_page_writes_explains_and_stops(gpt: GPT) -> None:
    async def write(page: Page, prompt: str, tokens: str) -> None:
        await page.type("#prompt", prompt)
        await page.type("#seed", "7")
        await page.type("#tokens", tokens)
        await page.point("#go", click=True)

    async def scenario(address: str, said: list[str]) -> None:
        async with browser() as page:
            await page.open(address)
            await write(page, "The <b>state</b> & ", "30")
            await page.until(
                "document.querySelector('#status').textContent.startsWith('30 tokens')"
            )
            await page.until("document.querySelector('#go').textContent === 'Go on'")
            prompt = "The <b>state</b> & "
            assert await page.js("document.querySelector('#text').textContent") == (
                prompt + text_of(gpt, prompt, 30, temperature=0.8, top_k=50, seed=7)
            )
            await page.point("#text i")
            card = await page.js("document.querySelector('#card').innerText")
            first = next(steps(gpt, Wish(prompt=prompt, seed=7, top_k=50)))
            assert "had a probability of" in card
            assert all(piece.replace(" ", "·") in card for piece, _ in first["likeliest"])
            await page.js("document.querySelector('#text').focus()")
            assert await page.js("document.querySelector('#card').hidden") is False

            await write(page, "again", str(MOST_TOKENS))
            await page.until("document.querySelectorAll('#text i').length > 5")
            await page.js(
                "document.querySelector('#tokens').value = ''"
            )  # no field keeps it running
            await page.point("#go", click=True)  # which is "Stop" now
            await eventually(lambda: said[-1].endswith("stopped by the page"))
            assert "stopped" in await page.js("document.querySelector('#status').textContent")

            await write(page, "and again", str(MOST_TOKENS))
            await page.until("document.querySelectorAll('#text i').length > 5")
            await page.open("about:blank")
            await eventually(lambda: len(said) == 3)
            assert said[0].endswith("done")
            assert said[2].endswith("stopped by the page")
            assert int(said[2].split()[0]) < MOST_TOKENS

            await page.open(address)
            await page.screen(390, 844)
            await page.until("innerWidth === 390")
            assert await page.js("document.documentElement.scrollWidth") <= 390
            await page.js("document.querySelector('#tokens').value = 5000")
            assert not await page.js("document.querySelector('#form').checkValidity()")
            await page.js("go()")
            await page.until("document.querySelector('#status').className === 'wrong'")
            assert page.complaints == [c for c in page.complaints if "400" in c]  # that request's

            long = "The people of this land. " * 300
            await write(page, long, "3")
            await page.until("document.querySelectorAll('#text i').length >= 3")
            shown = await page.js("document.querySelector('#text strong').textContent")
            assert shown == f"…{long[-600:]}"

    play(gpt, scenario)


REFUSED: list[tuple[dict[str, Any], str, int, str]] = [
    ({"Host": "attacker.example:80"}, "{}", 403, "attacker.example"),
    ({"Origin": "http://attacker.example"}, "{}", 403, "attacker.example"),
    ({"Origin": "null"}, "{}", 403, "null"),
    ({"Content-Type": "text/plain"}, "{}", 415, "application/json"),
    ({}, "nonsense", 400, "no JSON"),
    ({}, "[]", 400, "object"),
    ({}, json.dumps({"temprature": 1}), 400, "did you mean temperature?"),
    ({}, json.dumps({"tokens": MOST_TOKENS + 1}), 400, "request.tokens"),
    ({}, json.dumps({"tokens": 0}), 400, "request.tokens"),
    ({}, json.dumps({"prompt": "x" * 8001}), 400, "request.prompt"),
    ({}, json.dumps({"top_p": 1.5}), 400, "request.top_p"),
    ({}, json.dumps({"prompt": "x" * 2**17}), 413, ""),
]


def test_what_is_refused(gpt: GPT) -> None:
    async def scenario(address: str, said: list[str]) -> None:
        async with aiohttp.ClientSession() as session:
            for headers, body, status, reason in REFUSED:
                sent = {"Content-Type": "application/json", **headers}
                async with session.post(f"{address}generate", data=body, headers=sent) as answer:
                    assert (answer.status, headers) == (status, headers), await answer.text()
                    assert reason in await answer.text()
            async with session.get(address, headers={"Host": "attacker.example"}) as answer:
                assert answer.status == 403
            async with session.get(address) as answer:
                assert answer.status == 200
                assert answer.headers["X-Frame-Options"] == "DENY"
        assert said == []

    play(gpt, scenario)


def test_one_at_a_time_and_no_crowd(gpt: GPT) -> None:
    async def scenario(address: str, said: list[str]) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            wish = {"tokens": MOST_TOKENS, "temperature": 0, "prompt": "on and on"}
            running = [await session.post(f"{address}generate", json=wish) for _ in range(2)]
            assert "text" in json.loads(await running[0].content.readline())
            assert json.loads(await running[1].content.readline()) == {"waiting": 1}
            while len(running) < 1 + MOST_WAITING:
                running.append(await session.post(f"{address}generate", json=wish))
            async with session.post(f"{address}generate", json=wish) as answer:
                assert answer.status == 503
            running.pop(0).close()  # the next one's turn
            assert "text" in json.loads(await running[0].content.readline())
            assert said[0].endswith("stopped by the page")
            for answer in running:
                answer.close()

    play(gpt, scenario)


def test_mistakes_are_named(tmp_path: Path, gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"artifacts/checkpoint.*dvc repro"):
        main([])
    other = GPT.initialised(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=99))
    other.to_hf(tmp_path / "other")
    with pytest.raises(UserError, match="99 tokens"):
        read_model(tmp_path / "other")

    async def taken(address: str, said: list[str]) -> None:
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(UserError, match=f"--port {port}.*name another"):
            async with served(Playground(gpt, ""), port):
                pass

    play(gpt, taken)

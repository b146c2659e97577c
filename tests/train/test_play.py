"""Tests for train.play: the page in a real browser, and what the server refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig
from pipeline.format import tokenizer
from pipeline.runtime.errors import UserError
from tests.support.browser import CHROMIUM, Page, browser
from train import play as play_module
from train.play import (
    MAX_TOKENS,
    MAX_WAITING,
    GenerateRequest,
    Playground,
    generate,
    load_model,
    main,
)
from train.serve import serve

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=64)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return GPT.initialised(CONFIG, seed=3)


def text_of(gpt: GPT, prompt: str, n: int, **settings: Any) -> str:
    """Continuation by `GPT.generate`."""
    row = [tokenizer.EOT, *tokenizer.encode(prompt)]
    (tokens,) = gpt.generate([row], n, **settings)
    return tokenizer.decode([t for t in tokens[len(row) :] if t != tokenizer.EOT])


def test_text_is_the_one_that_the_model_generates(gpt: GPT) -> None:
    settings: dict[str, Any] = {"temperature": 2.0, "top_k": 9, "top_p": 0.5, "seed": 4}
    events = list(generate(gpt, GenerateRequest(prompt="Once", tokens=20, **settings)))
    assert "".join(event["text"] for event in events) == text_of(gpt, "Once", 20, **settings)
    for event in events:
        ps = [p for _, p, _ in event["likeliest"]]
        assert ps == sorted(ps, reverse=True)
        assert 0 < event["probability"] <= ps[0] < 1
    greedy = next(generate(gpt, GenerateRequest(temperature=0)))
    found = greedy["token"], greedy["probability"], greedy["id"]
    assert found == greedy["likeliest"][0]

    # From any token on, with the same text, also where a character is cut.
    ids = [event["id"] for event in events]
    for kept in range(20):
        request = GenerateRequest(
            prompt="Once", continuation=ids[: kept + 1], shown=kept, tokens=1, temperature=0
        )
        (shown, *_) = generate(gpt, request)
        assert shown == {"text": events[kept]["text"]}


def test_incomplete_characters_wait_for_their_last_token() -> None:
    odd = GPT.initialised(CONFIG, seed=3)
    pieces = [rank for piece, rank in tokenizer.ranks().items() if len(piece) == 1 and piece > b"~"]
    with torch.no_grad():
        odd.wte.weight[pieces] *= 50  # makes bytes of longer characters likely
    events = list(generate(odd, GenerateRequest(tokens=25, seed=1, temperature=1.0)))
    assert "".join(event["text"] for event in events) == text_of(odd, "", 25, seed=1)
    assert any(not event["text"] for event in events)


def play(gpt: GPT, scenario: Callable[[str, list[str]], Awaitable[None]]) -> None:
    """Run a scenario with the address of a playground and the lines that it logs."""

    async def run() -> None:
        log: list[str] = []
        async with serve(Playground(gpt, "a test", log.append).app(), 0) as address:
            await asyncio.wait_for(scenario(address, log), 90)

    asyncio.run(run())


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("timed out")


@needs_chromium
def test_page_generates_explains_and_stops(gpt: GPT) -> None:
    async def submit(page: Page, prompt: str, tokens: str) -> None:
        await page.type("#prompt", prompt)
        await page.type("#seed", "7")
        await page.type("#tokens", tokens)
        await page.point("#generate", click=True)

    async def scenario(address: str, log: list[str]) -> None:
        async with browser() as page:
            await page.open(address)
            await submit(page, "The <b>state</b> & ", "30")
            await page.until(
                "document.querySelector('#status').textContent.startsWith('30 tokens')"
            )
            await page.until("document.querySelector('#generate').className === ''")
            prompt = "The <b>state</b> & "
            assert await page.js("document.querySelector('#text').textContent") == (
                prompt + text_of(gpt, prompt, 30, temperature=0.8, top_k=50, seed=7)
            )
            await page.point("#text i")
            card = await page.js("document.querySelector('#card').innerText")
            first = next(generate(gpt, GenerateRequest(prompt=prompt, seed=7, top_k=50)))
            assert "probability" in card
            assert all(piece.replace(" ", "·") in card for piece, *_ in first["likeliest"])
            await page.js("document.querySelector('#text').focus()")
            assert await page.js("document.querySelector('#card').hidden") is False

            first_ids = await page.js("tokens.flat().map(token => token.id)")
            await page.point("#continue", click=True)
            await page.until("tokens.flat().length === 60 && !running")
            row = [tokenizer.EOT, *tokenizer.encode(prompt), *first_ids]
            (row,) = gpt.generate([row], 30, 0.8, top_k=50, seed=7)
            ids = row[1 + len(tokenizer.encode(prompt)) :]
            assert await page.js("tokens.flat().map(token => token.id)") == ids

            await page.point("#text i:nth-of-type(3)", click=True)
            likelier = await page.js("tokens[2][0].likeliest[4]")
            kept = await page.js("tokens.slice(0, 2).flat().map(token => token.id)")
            await page.point("#card dt:nth-of-type(5) button", click=True)
            await page.until("!running")
            branched = await page.js("tokens.flat().map(token => token.id)")
            assert branched[: len(kept) + 1] == [*kept, likelier[2]]
            assert len(branched) == len(kept) + 1 + 30
            assert await page.js("document.querySelector('#card').hidden")

            granted = ["clipboardReadWrite", "clipboardSanitizedWrite"]
            await page.call("Browser.grantPermissions", permissions=granted)
            await page.point("#copy", click=True)
            await page.until("document.querySelector('#status').textContent === 'copied'")
            shown = tokenizer.decode([i for i in branched if i != tokenizer.EOT])
            assert await page.js("navigator.clipboard.readText()") == prompt + shown

            await submit(page, "again", str(MAX_TOKENS))
            await page.until("document.querySelectorAll('#text i').length > 5")
            # An invalid field must not keep it running.
            await page.js("document.querySelector('#tokens').value = ''")
            await page.point("#generate", click=True)  # now it is "Stop"
            await eventually(lambda: log[-1].endswith("stopped by the page"))
            assert "stopped" in await page.js("document.querySelector('#status').textContent")

            await submit(page, "and again", str(MAX_TOKENS))
            await page.until("document.querySelectorAll('#text i').length > 5")
            await page.open("about:blank")
            await eventually(lambda: len(log) == 5)
            assert log[0].endswith("done")
            assert log[4].endswith("stopped by the page")
            assert int(log[4].split()[0]) < MAX_TOKENS

            await page.open(address)
            await page.screen(390, 844)
            await page.until("innerWidth === 390")
            assert await page.js("document.documentElement.scrollWidth") <= 390
            await page.js("document.querySelector('#tokens').value = 5000")
            assert not await page.js("document.querySelector('#form').checkValidity()")
            await page.js("start()")
            await page.until("document.querySelector('#status').className === 'error'")
            assert page.complaints == [
                c for c in page.complaints if "400" in c
            ]  # the refused request

            long = "The people of this land. " * 300
            await submit(page, long, "3")
            await page.until("document.querySelectorAll('#text i').length >= 3")
            shown = await page.js("document.querySelector('#text strong').textContent")
            assert shown == f"…{long[-600:]}"

    play(gpt, scenario)


REFUSED: list[tuple[dict[str, Any], str, int, str]] = [
    ({"Host": "attacker.example:80"}, "{}", 403, "attacker.example"),
    ({"Origin": "http://attacker.example"}, "{}", 403, "attacker.example"),
    ({"Origin": "null"}, "{}", 403, "null"),
    ({"Sec-Fetch-Site": "cross-site"}, "{}", 403, "Sec-Fetch-Site"),
    ({"Content-Type": "text/plain"}, "{}", 415, "application/json"),
    ({}, "nonsense", 400, "JSON"),
    ({}, "[]", 400, "JSON object"),
    ({}, json.dumps({"temprature": 1}), 400, "request.temprature"),
    ({}, json.dumps({"tokens": MAX_TOKENS + 1}), 400, "request.tokens"),
    ({}, json.dumps({"tokens": 0}), 400, "request.tokens"),
    ({}, json.dumps({"prompt": "x" * 8001}), 400, "request.prompt"),
    ({}, json.dumps({"top_p": 1.5}), 400, "request.top_p"),
    ({}, json.dumps({"prompt": "x" * 2**17}), 413, ""),
]


def test_foreign_and_invalid_requests_are_refused(gpt: GPT) -> None:
    async def scenario(address: str, log: list[str]) -> None:
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
        assert log == []

    play(gpt, scenario)


POST = b"POST /generate HTTP/1.1"
JSON = b"Content-Type: application/json"
MALFORMED = [  # first line, headers, body
    (POST, [JSON, b"Content-Length: -2"], b"{}"),
    (POST, [JSON, b"Content-Length: " + b"9" * 30], b"{}"),
    (POST, [JSON, b"Content-Length: 20"], b"{}"),
    (POST, [JSON, b"Content-Length: 2", b"Transfer-Encoding: chunked"], b"{}"),
    (POST, [JSON, b"Transfer-Encoding: chunked"], b"zz\r\n{}\r\n0\r\n\r\n"),
    (POST, [JSON, b"Content-Encoding: gzip", b"Content-Length: 2"], b"{}"),
    (POST, [JSON, b"Content-Length: 60000"], b"[" * 60000),
    (POST, [JSON, b"Content-Length: 18"], b'{"prompt": "\xff\xfe"}'),
    (POST, [JSON, b"Content-Length: 19"], b'{"prompt":"\\ud800"}'),
    (POST, [JSON, b"Content-Length: 20"], b'{"temperature": NaN}'),
    (POST, [JSON, b"Content-Length: 6000"], b'{"seed": ' + b"9" * 5990 + b"}"),
    (b"FETCH /generate HTTP/1.1", [], b""),
    (b"PUT / HTTP/1.1", [], b""),
    (b"GET /../%ff%00 HTTP/1.1", [], b""),
    (b"GET / HTTP/9.9", [], b""),
    (b"GET / HTTP/1.1", [b"broken"], b""),
    (b"GET / HTTP/1.1", [b"X: " + b"a" * 9000], b""),
]
HOSTS = [
    b"127.0.0.1",
    b"localhost:1",
    b"[::",
    b"\xff\xfe",
    b"xn--",
    b"a@127.0.0.1",
    b"127.0.0.1:x",
    b"",
]


def ask(
    gpt: GPT, line: bytes, headers: list[bytes], body: bytes, host: bytes = b"127.0.0.1"
) -> int:
    """Send a request to a playground, and return the status of the answer."""
    head = b"\r\n".join([line, b"Host: " + host, *headers, b"", b""])

    async def exchange() -> bytes:
        async with serve(Playground(gpt, "", lambda _: None).app(), 0) as address:
            port = int(address.rstrip("/").rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + body)
            answer = await asyncio.wait_for(reader.readline(), 10)
            writer.close()
            return answer

    return int(asyncio.run(exchange()).split()[1])


def test_malformed_requests_get_a_status_of_4xx_and_no_traceback(
    gpt: GPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(play_module, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(play_module, "generate", lambda *_: iter(()))
    for line, headers, body in MALFORMED:
        assert 400 <= ask(gpt, line, headers, body) < 500, (line, headers, body[:99])
    for host in HOSTS[2:]:
        assert 400 <= ask(gpt, POST, [JSON, b"Content-Length: 2"], b"{}", host) < 500, host

    values = st.recursive(
        st.none() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=4
    )
    fields = st.sampled_from([*GenerateRequest.model_fields, "else"])
    bodies = st.binary(max_size=99) | st.dictionaries(fields, values).map(
        lambda value: json.dumps(value).encode()
    )
    lines = [line for line, _, _ in MALFORMED]
    headers = [header for _, headers, _ in MALFORMED for header in headers]
    noise = st.binary(max_size=20).map(lambda value: b"X: " + value.replace(b"\n", b""))

    @settings(max_examples=30)
    @given(
        st.sampled_from(lines),
        st.lists(st.sampled_from(headers) | noise, max_size=3),
        bodies,
        st.sampled_from(HOSTS),
        st.booleans(),
    )
    def check(line: bytes, more: list[bytes], body: bytes, host: bytes, complete: bool) -> None:
        length = [b"Content-Length: %d" % len(body)] * complete
        status = ask(gpt, line, [JSON, *length, *more], body, host)
        assert status == 200 or 400 <= status < 500

    check()
    assert caplog.records == []


def test_one_generation_at_a_time_and_a_short_queue(gpt: GPT) -> None:
    async def scenario(address: str, log: list[str]) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            request = {"tokens": MAX_TOKENS, "temperature": 0, "prompt": "on and on"}
            running = [await session.post(f"{address}generate", json=request) for _ in range(2)]
            assert "text" in json.loads(await running[0].content.readline())
            assert json.loads(await running[1].content.readline()) == {"waiting": 1}
            while len(running) < 1 + MAX_WAITING:
                running.append(await session.post(f"{address}generate", json=request))
            async with session.post(f"{address}generate", json=request) as answer:
                assert answer.status == 503
            running.pop(0).close()  # the next one starts
            assert "text" in json.loads(await running[0].content.readline())
            assert log[0].endswith("stopped by the page")
            for answer in running:
                answer.close()

    play(gpt, scenario)


def test_mistake_is_named(tmp_path: Path, gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--checkpoint artifacts/checkpoint"):
        main([])
    other = GPT.initialised(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=99))
    other.to_hf(tmp_path / "other")
    with pytest.raises(UserError, match=r"--checkpoint .*other: .* 99 "):
        load_model(tmp_path / "other")

    async def taken(address: str, log: list[str]) -> None:
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(UserError, match=f"--port {port}: "):
            async with serve(Playground(gpt, "").app(), port):
                pass

    play(gpt, taken)

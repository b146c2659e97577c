"""`python -m train.play`: a local web page that continues a prompt with a trained model.

The server is reachable from this machine only. Other web sites could still send requests to it
through the user's browser, or rebind a DNS name of their own to 127.0.0.1, so requests with another
host name or origin are refused. A malformed request gets a status of 4xx, and no line in the log.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from aiohttp import http_exceptions, web
from pydantic import AfterValidator, Field
from torch import Tensor

from model import GPT
from model.config import check_temperature
from model.errors import FormatError
from model.generate import load
from model.generation import stream
from model.size import parameter_count
from pipeline.format import tokenizer
from pipeline.runtime import command
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import Section, validate
from train.distributed.devices import device_type
from train.report import html
from train.report.model_probe import token_text, top_tokens

HOST = "127.0.0.1"
HOST_HEADER = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.IGNORECASE)

MAX_CHARACTERS = 8000  # per prompt
MAX_TOKENS = 1000  # per generation
MAX_WAITING = 4  # generations in the queue
BODY_SECONDS = 10.0  # for a request's body to arrive
LIKELIEST = 8  # most likely tokens shown for each position


class GenerateRequest(Section):
    """Request of the page for a generation."""

    prompt: str = Field(default="", max_length=MAX_CHARACTERS)
    """Text to continue; empty starts a document."""

    tokens: int = Field(default=200, ge=1, le=MAX_TOKENS)
    """Largest number of new tokens."""

    temperature: Annotated[float, AfterValidator(check_temperature)] = Field(default=0.8, le=5)
    """0: always the most likely token; 1: the model's distribution; above 1: flatter."""

    top_k: int | None = Field(default=None, ge=1)
    """Sample from the k most likely tokens; null: from all."""

    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the fewest tokens with this total probability; null: from all."""

    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed; null: random."""


def generate(gpt: GPT, request: GenerateRequest) -> Iterator[dict[str, Any]]:
    """Generate tokens, as events for the page.

    The text is the same as that of ``model.generate`` with these settings. Probabilities are the
    model's, before temperature, top-k and top-p.

    Yields:
        For each token, its "text" (empty until the last token of a character), the "token", its
        "probability", and the "likeliest" tokens at its position. At the end, the "text" of a
        character that was never completed.
    """
    logits: list[Tensor] = []
    prompt = [tokenizer.EOT, *tokenizer.encode(request.prompt)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    settings = (request.tokens, request.temperature, request.top_k, request.top_p, request.seed)
    for (token,) in stream(gpt, [prompt], *settings, on_logits=logits.append):
        assert token is not None
        probabilities = logits.pop()[0].softmax(0)  # (V,)
        data = b"" if token == tokenizer.EOT else tokenizer.decode_bytes([token])
        yield {
            "text": decoder.decode(data),
            "token": token_text(token),
            "probability": float(probabilities[token]),
            "likeliest": top_tokens(probabilities, LIKELIEST),
        }
    if rest := decoder.decode(b"", final=True):
        yield {"text": rest}


class Playground:
    """Server of one model, which runs one generation at a time, and logs a line at its end."""

    def __init__(self, gpt: GPT, name: str, log: Callable[[str], None] = print) -> None:
        self.gpt, self.name, self.log = gpt, name, log
        self._lock = asyncio.Lock()
        self._pending = 0  # generations that run or wait

    def app(self) -> web.Application:
        """Build the web application."""
        app = web.Application(middlewares=[_only_this_machine], client_max_size=2**16)
        app.router.add_get("/", self._page)
        app.router.add_post("/generate", self._generate)
        return app

    async def _page(self, request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(16)
        config = self.gpt.config
        text = html.render(
            "play.html",
            nonce=nonce,
            name=self.name,
            config=config,
            parameters=parameter_count(config),
            max_tokens=MAX_TOKENS,
            max_characters=MAX_CHARACTERS,
        )
        return web.Response(text=text, content_type="text/html")

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        settings = await _read_settings(request)
        if self._pending > MAX_WAITING:
            raise web.HTTPServiceUnavailable(
                text="too many generations are waiting; try again later"
            )
        response = web.StreamResponse()
        response.content_type = "application/x-ndjson"
        self._pending += 1
        try:
            await response.prepare(request)
            if self._lock.locked():
                await _send(response, {"waiting": self._pending - 1})
            async with self._lock:
                await self._run(settings, response)
        except ConnectionError:  # the page has closed
            pass
        finally:
            self._pending -= 1
        return response

    async def _run(self, settings: GenerateRequest, response: web.StreamResponse) -> None:
        begin, count, end = time.perf_counter(), 0, "stopped by the page"
        events = generate(self.gpt, settings)
        try:
            # Each token is computed in a thread, so that the server can answer other requests. A
            # page that has closed cancels this task between two tokens.
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                await _send(response, event)
                count += 1
            end = "done"
            await _send(response, {"end": True, "seconds": time.perf_counter() - begin})
        except ConnectionError:
            pass
        finally:
            self.log(f"{count} tokens in {time.perf_counter() - begin:.1f} s: {end}")


async def _read_settings(request: web.Request) -> GenerateRequest:
    """Read a request for a generation.

    Raises:
        HTTPClientError: It is malformed.
    """
    if request.content_type != "application/json" or "Content-Encoding" in request.headers:
        raise web.HTTPUnsupportedMediaType(text="send application/json, not compressed")
    try:
        body = json.loads(await asyncio.wait_for(request.read(), BODY_SECONDS))
        if not isinstance(body, dict):
            raise UserError("request: send a JSON object")
        return validate(GenerateRequest, body, "request")
    except UserError as error:
        raise web.HTTPBadRequest(text=printable(str(error))) from None
    except asyncio.TimeoutError:
        raise web.HTTPRequestTimeout(text="request: the body is incomplete") from None
    except (ValueError, RecursionError, web.RequestPayloadError):
        raise web.HTTPBadRequest(text="request: not JSON") from None


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(json.dumps(event).encode() + b"\n")


@web.middleware
async def _only_this_machine(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse other host names and other origins."""
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1 or not HOST_HEADER.fullmatch(hosts[0]):
        raise web.HTTPForbidden(text=f"host {printable(', '.join(hosts))} is refused; use {HOST}")
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{hosts[0]}":
        raise web.HTTPForbidden(text=f"origin {printable(origin)} is refused")
    return await handler(request)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(
        {
            "X-Frame-Options": "DENY",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
    )


def _is_fault(record: logging.LogRecord) -> bool:
    """Whether a record of aiohttp's is about this server, and not about a malformed request."""
    malformed = (http_exceptions.HttpProcessingError, web.RequestPayloadError)
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (*malformed, ConnectionError))


@asynccontextmanager
async def serve(playground: Playground, port: int) -> AsyncIterator[str]:
    """Serve a playground and yield its address.

    Raises:
        UserError: The port is not available.
    """
    app = playground.app()
    app.on_response_prepare.append(_add_headers)
    logger = logging.getLogger("train.play")
    logger.addFilter(_is_fault)
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=1, logger=logger
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, HOST, port).start()
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: {error}; use another, or 0 for any") from None
        yield f"http://{HOST}:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def load_model(folder: Path) -> GPT:
    """Load the model of a checkpoint to this machine's device.

    Raises:
        UserError: There is no model, or its vocabulary is not GPT-2's.
    """
    try:
        gpt = load(folder)
    except FormatError as error:
        raise UserError(f"{error}; `dvc repro` trains one in artifacts/checkpoint") from None
    if gpt.config.vocab_size != tokenizer.N_VOCAB:
        raise UserError(
            f"--checkpoint {folder}: the vocabulary has {gpt.config.vocab_size} tokens; use a "
            f"model with GPT-2's {tokenizer.N_VOCAB}"
        )
    tokenizer.encode("")  # load the tokenizer before the first request
    return gpt.to(torch.device(device_type(Machine.load().device)))


async def _serve_forever(playground: Playground, port: int) -> None:
    async with serve(playground, port) as address:
        print(f"play: {playground.name} at {address}; Ctrl-C to stop", flush=True)
        await asyncio.Event().wait()


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    parser = command.Parser(
        prog="python -m train.play",
        description="Generate text in the browser, from a model on this machine.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("artifacts/checkpoint"), metavar="DIR",
        help="a checkpoint, or a folder in the Hugging Face layout (default artifacts/checkpoint)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0: any free port")
    args = parser.parse_args(argv)
    playground = Playground(
        load_model(args.checkpoint), str(args.checkpoint), lambda line: print(line, flush=True)
    )
    try:
        asyncio.run(_serve_forever(playground, args.port))
    except KeyboardInterrupt:
        print("play: stopped")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))

"""`python -m train.play`: a local web page that continues a prompt with a trained model."""

from __future__ import annotations

import asyncio
import codecs
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from aiohttp import web
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
from train import serve
from train.distributed.devices import device_type
from train.report import html
from train.report.model_probe import token_text

MAX_CHARACTERS = 8000  # per prompt
MAX_TOKENS = 1000  # per generation
MAX_CONTINUATION = 8000  # tokens of a text that is continued
MAX_WAITING = 4  # generations in the queue
BODY_SECONDS = 10.0  # for a request's body to arrive
LIKELIEST = 8  # most likely tokens shown for each position


class GenerateRequest(Section):
    """Request of the page for a generation."""

    prompt: str = Field(default="", max_length=MAX_CHARACTERS)
    """Text to continue; empty starts a document."""

    continuation: list[Annotated[int, Field(ge=0, lt=tokenizer.N_VOCAB)]] = Field(
        default=[], max_length=MAX_CONTINUATION
    )
    """Tokens after the prompt, to continue from."""

    shown: int = Field(default=0, ge=0)
    """Number of them whose text the page has."""

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
        The "text" of the tokens of the continuation that are not shown, if there are such. For each
        new token, its "text" (empty until the last token of a character), its "id", the "token" as
        text, its "probability", and the "likeliest" tokens at its position, as text, probability
        and id. At the end, the "text" of a character that was never completed.
    """
    logits: list[Tensor] = []
    prompt = [tokenizer.EOT, *tokenizer.encode(request.prompt), *request.continuation]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(_text_bytes(request.continuation[: request.shown]))
    if hidden := request.continuation[request.shown :]:
        yield {"text": decoder.decode(_text_bytes(hidden))}
    settings = (request.tokens, request.temperature, request.top_k, request.top_p, request.seed)
    for (token,) in stream(gpt, [prompt], *settings, on_logits=logits.append):
        assert token is not None
        probabilities = logits.pop()[0].softmax(0)  # (V,)
        yield {
            "text": decoder.decode(_text_bytes([token])),
            "id": token,
            "token": token_text(token),
            "probability": float(probabilities[token]),
            "likeliest": _likeliest(probabilities),
        }
    if rest := decoder.decode(b"", final=True):
        yield {"text": rest}


def _text_bytes(tokens: Sequence[int]) -> bytes:
    return tokenizer.decode_bytes([token for token in tokens if token != tokenizer.EOT])


def _likeliest(probabilities: Tensor) -> list[tuple[str, float, int]]:
    """Return text, probability and id of the most likely tokens of (V,) probabilities."""
    values, ids = probabilities.topk(LIKELIEST)
    return [(token_text(i), p, i) for i, p in zip(ids.tolist(), values.tolist(), strict=True)]


class Playground:
    """Server of one model, which runs one generation at a time, and logs a line at its end."""

    def __init__(self, gpt: GPT, name: str, log: Callable[[str], None] = print) -> None:
        self.gpt, self.name, self.log = gpt, name, log
        self._lock = asyncio.Lock()
        self._pending = 0  # generations that run or wait

    def app(self) -> web.Application:
        """Build the web application."""
        app = web.Application(client_max_size=2**17)
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
    parser.add_argument("--port", type=int, help=serve.PORT_HELP)
    args = parser.parse_args(argv)
    playground = Playground(
        load_model(args.checkpoint), str(args.checkpoint), lambda line: print(line, flush=True)
    )
    serve.run(playground.app(), args.port, "play", playground.name)


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))

"""Download of one file over HTTP, with resume, retries and a check of its hash.

```
 GET Range: bytes=N-, If-Range: ETag ◄────── wait: Retry-After, or exponential ◄────────┐
   │                                                                                    │
   ├─ 206, same ETag ──► append ──────┬──► disconnected, reset, stalled ────────────────┤
   ├─ 200 ──► restart at byte 0 ──────┘                                                 │
   ├─ 408, 429, 5xx ────────────────────────────────────────────────────────────────────┘
   └─ 401, 403, 404 ──► Refused
 complete ──► hash matches: done; differs: download once more, then UserError
```

The token is sent to the first host only: the hub redirects large files to storage on another host.
"""

import contextlib
import random
import re
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from pipeline.download.partial_file import PartialFile
from pipeline.runtime.errors import UserError

# A read returns the bytes received so far, up to this many: a kill loses little, and at full speed
# system calls are rare.
_READ_BYTES = 1 << 18
_TIMEOUTS = (10.0, 30.0)  # seconds to connect, seconds without a byte
_MAX_REDIRECTS = 5
RETRY_STATUSES = (408, 429, 500, 502, 503, 504)
_MAX_BACKOFF = 60.0  # seconds; a server may ask for more
# Storage refuses expired URLs: the next attempt asks the hub for a new one.
_MAX_STORAGE_REFUSALS = 3


class Refused(Exception):
    """The server, or one that it redirected to, refuses the file permanently.

    ``status`` is the HTTP status, ``code`` the `X-Error-Code` header.
    """

    def __init__(self, status: int, code: str | None, redirected: bool = False) -> None:
        super().__init__(status, code, redirected)
        self.status, self.code, self.redirected = status, code, redirected


class _Retry(Exception):
    """The attempt failed and may be repeated; ``wait``: seconds requested by the server."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _WrongFile(Exception):
    """The response cannot be the requested file."""


class Patience:
    """Waits between attempts to get ``name``; gives up after ``seconds`` without progress."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.progress()

    def progress(self) -> None:
        """Record progress: reset the backoff and the deadline."""
        self._failures = 0
        self._deadline = time.monotonic() + self.seconds

    def wait(self, reason: str, requested: float | None = None) -> None:
        """Sleep before the next attempt: ``requested`` seconds or exponential backoff, and jitter.

        Raises:
            UserError: The wait would exceed the deadline.
        """
        backoff = min(_MAX_BACKOFF, 0.5 * 2 ** min(self._failures, 10))
        wait = backoff if requested is None else requested
        # Jitter, so that clients refused at the same time do not retry at the same time.
        wait += random.uniform(0, 0.25 * min(wait, 20) + 0.25)
        self._failures += 1
        if time.monotonic() + wait > self._deadline:
            asked = f" (the server asks to wait {requested:.0f} s)" if requested is not None else ""
            raise UserError(
                f"{self.name}: {reason}{asked}, no progress within {self.seconds:.0f} s (patience "
                "in machine.yaml); run the same command later to resume"
            )
        print(f"{self.name}: {reason}; next attempt in {wait:.1f} s", flush=True)
        time.sleep(wait)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds a server asks to wait, by `Retry-After` or the hub's `RateLimit`."""
    after = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d*)?", after):
        return float(after)
    if after:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            # By the server's clock: this machine's may be wrong.
            now = _date(headers["Date"]) if "Date" in headers else datetime.now(timezone.utc)
            return max(0.0, (_date(after) - now).total_seconds())
    # "api";r=0;t=55: no requests remain, and the window ends in 55 seconds.
    limit = headers.get("RateLimit", "")
    remains, until = re.search(r"\br\s*=\s*(\d+)", limit), re.search(r"\bt\s*=\s*(\d+)", limit)
    if until and (remains is None or remains[1] == "0"):
        return float(until[1])
    return None


def _date(text: str) -> datetime:
    date = parsedate_to_datetime(text)
    return date if date.tzinfo else date.replace(tzinfo=timezone.utc)


def fetch(
    name: str, url: str, partial: PartialFile, expected: str, token: str | None, patience: float
) -> None:
    """Download the missing bytes of a file and check its hash.

    Args:
        name: The file's name in messages.
        expected: The file's sha256, or its git blob hash if ``partial`` computes one.
        token: Bearer token, sent to the host of ``url`` only.
        patience: Seconds without a new byte after which to give up.

    Raises:
        UserError: The hash was wrong twice, or there was no progress.
        Refused: The server refuses the file.
    """
    wrong = f"{name}: expected {'sha256' if partial.git is None else 'git sha1'} {expected}"
    with requests.Session() as session:
        session.auth = _no_netrc
        for last in (False, True):
            try:
                _fetch_missing(name, url, partial, session, token, patience)
                found = partial.git or partial.sha256
            except _WrongFile as error:
                found = str(error)
            if found == expected:
                return
            partial.restart()
            if not last:
                print(f"{wrong}, got {found}; downloading it again", flush=True)
    raise UserError(
        f"{wrong}, got {found} twice; a server or proxy corrupts the file: run the same command "
        "later, or use another network"
    )


def _fetch_missing(
    name: str,
    url: str,
    partial: PartialFile,
    session: requests.Session,
    token: str | None,
    seconds: float,
) -> None:
    """Send requests until the file is complete."""
    patience = Patience(name, seconds)
    most, refusals = partial.done, 0
    while partial.done < partial.size:
        try:
            _request(url, partial, session, token)
            if partial.done == partial.size:
                return
            failure = _Retry("disconnected")
        except _Retry as error:
            failure = error
        except Refused as error:
            refusals += 1
            if not error.redirected or refusals == _MAX_STORAGE_REFUSALS:
                raise
            failure = _Retry(f"HTTP {error.status} from the storage")
        if partial.done > most:
            most = partial.done
            patience.progress()
        patience.wait(f"{failure} at {partial.done:,} of {partial.size:,} bytes", failure.wait)


def _request(url: str, partial: PartialFile, session: requests.Session, token: str | None) -> None:
    """Send one request and append the bytes of its response."""
    headers = {"Accept-Encoding": "identity"}
    if partial.done:
        headers["Range"] = f"bytes={partial.done}-"
        if partial.etag and not partial.etag.startswith("W/"):  # If-Range allows no weak ETag
            headers["If-Range"] = partial.etag
    response, redirected = _get(url, session, headers, token)
    with response:
        status, etag = response.status_code, response.headers.get("ETag")
        if status in RETRY_STATUSES:
            raise _Retry(f"HTTP {status}", retry_after(response.headers))
        if status == 416:
            partial.restart()
            raise _Retry("HTTP 416: no such range; restarting at byte 0")
        if status == 206:
            given = response.headers.get("Content-Range", "")
            content = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]+/([0-9]+|\*)", given)
            if not content or int(content[1]) != partial.done:
                partial.restart()
                raise _Retry("the server sent another range; restarting at byte 0")
            if partial.etag and etag and partial.etag != etag:
                partial.restart()
                raise _Retry("the file changed on the server; restarting at byte 0")
            total = content[2]
        elif status == 200:  # possible even if a range was requested
            # What cannot be sent back in If-Range would stop every later attempt.
            partial.restart(etag if re.fullmatch(r"[!-~]+", etag or "") else None)
            total = response.headers.get("Content-Length", "*")
        else:
            raise Refused(status, response.headers.get("X-Error-Code"), redirected)
        if re.fullmatch(r"[0-9]+", total) and not re.fullmatch(f"0*{partial.size}", total):
            raise _WrongFile(f"a file of {total[:20]} bytes instead of {partial.size}")
        _append(response, partial)


def _append(response: requests.Response, partial: PartialFile) -> None:
    while True:
        try:
            block = response.raw.read1(_READ_BYTES)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Retry(_describe(error)) from None
        if not block:
            return
        if partial.done + len(block) > partial.size:
            raise _WrongFile(f"more than {partial.size:,} bytes")
        partial.append(block)


def _get(
    url: str, session: requests.Session, headers: Mapping[str, str], token: str | None
) -> tuple[requests.Response, bool]:
    """Send a GET, follow redirects; return the response, and whether its origin differs."""
    first = _origin(url)
    for _ in range(_MAX_REDIRECTS):
        redirected = _origin(url) != first
        secret = {"Authorization": f"Bearer {token}"} if token and not redirected else {}
        try:
            response = session.get(
                url,
                headers={**headers, **secret},
                stream=True,
                allow_redirects=False,
                timeout=_TIMEOUTS,
            )
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise _Retry(_describe(error)) from None
        if not response.is_redirect:
            return response, redirected
        response.close()
        try:
            url = urljoin(url, response.headers["Location"])
            _origin(url)
        except ValueError:
            raise _Retry("a redirect to an invalid URL") from None
    raise _Retry("too many redirects")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keep `requests` from replacing the token by a password of `~/.netrc`."""
    return request


def _describe(error: Exception) -> str:
    """Describe an error without its URL: a storage URL is signed and therefore secret."""
    text = repr(error).lower()
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError) or "timed out" in text:
        return f"no byte for {_TIMEOUTS[1]:.0f} s"
    for word, meaning in (
        ("reset", "connection reset"),
        ("refused", "connection refused"),
        ("resol", "unknown host"),
        ("incompleteread", "disconnected"),
    ):
        if word in text:
            return meaning
    return type(error).__name__

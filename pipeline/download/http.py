"""One file over HTTP: taken up where it was left, patient, and held against its hash.

```
 GET Range: bytes=N-, If-Range: ETag ◄────── wait: as told, or longer each time ◄──────┐
   │                                                                                    │
   ├─ 206, the same ETag ──► append ──┬──► cut, reset, stalled ─────────────────────────┤
   ├─ 200 ──► begin at 0 ─────────────┘                                                 │
   ├─ 408, 429, 5xx ────────────────────────────────────────────────────────────────────┘
   └─ 401, 403, 404 ──► Refused
 whole ──► its hash is right: done; wrong: once more from 0, then a UserError
```

The token goes to the first host only: the hub redirects large files to storage elsewhere.
"""

import random
import re
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from pipeline.download.partial_file import Partial
from pipeline.runtime.errors import UserError

# What has come is taken at once, up to so much: a killed process loses little that had arrived, and
# at full speed a read is as large as a system call is worth.
_READ_BYTES = 1 << 18
_TIMEOUTS = (10.0, 30.0)  # seconds to connect, and without a byte
_MAX_REDIRECTS = 5
# The answers after which a later try may go well.
PASSING = (408, 429, 500, 502, 503, 504)
_MAX_BACKOFF = 60.0  # seconds; a server may ask for more
# Storage may refuse an address that is too old: the next try asks the hub for a new one.
_STORAGE_REFUSALS = 3


class Refused(Exception):
    """The server does not give the file, now or later.

    Args:
        status: of its answer.
        code: its `X-Error-Code`: what it says is wrong.
        elsewhere: it is another server, to which the first redirected.
    """

    def __init__(self, status: int, code: str | None, elsewhere: bool = False) -> None:
        super().__init__(status, code, elsewhere)
        self.status, self.code, self.elsewhere = status, code, elsewhere


class _Later(Exception):
    """It did not work this time; ``wait``: seconds, where the server said."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Different(Exception):
    """What the server sends cannot be the file that is wanted."""


class Patience:
    """Waiting between tries, as long as something comes of it.

    Args:
        name: of what is fetched, for the line that says why it waits.
        seconds: without progress, after which to give up.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.progress()

    def progress(self) -> None:
        """It goes on: begin to count anew."""
        self._failures = 0
        self._deadline = time.monotonic() + self.seconds

    def wait(self, reason: str, told: float | None = None) -> None:
        """Sleep before the next try: ``told`` seconds, else twice as long each time, and jitter.

        Raises:
            UserError: the patience is at its end, or would be.
        """
        wait = min(_MAX_BACKOFF, 0.5 * 2**self._failures) if told is None else told
        # So that many that were turned away together do not come back together.
        wait += random.uniform(0, 0.25 * min(wait, 20) + 0.25)
        self._failures += 1
        if time.monotonic() + wait > self._deadline:
            asked = f", which asks for a wait of {told:.0f} s" if told is not None else ""
            raise UserError(
                f"{self.name}: {reason}{asked}: no progress in {self.seconds:.0f} s (patience in "
                "machine.yaml); run the same command later, it goes on from here"
            )
        print(f"{self.name}: {reason}; next try in {wait:.1f} s", flush=True)
        time.sleep(wait)


def told_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: `Retry-After`, or `RateLimit` as the hub sends it."""
    after = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d*)?", after):
        return float(after)
    if after:
        try:
            date = parsedate_to_datetime(after)
        except ValueError:
            pass
        else:
            date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
            return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
    # "api";r=0;t=55: nothing remains, 55 seconds until the window ends.
    limit = headers.get("RateLimit", "")
    remains, until = re.search(r"\br\s*=\s*(\d+)", limit), re.search(r"\bt\s*=\s*(\d+)", limit)
    if until and (remains is None or remains[1] == "0"):
        return float(until[1])
    return None


def fetch(
    name: str, url: str, partial: Partial, expected: str, token: str | None, patience: float
) -> None:
    """Fetch what is missing of a file, until its hash is right.

    Args:
        name: of the file, for messages.
        expected: its sha256, or its git name where ``partial`` computes one.
        token: sent as a bearer token to the host of ``url``, and to no other.
        patience: seconds without a new byte, after which to give up.

    Raises:
        UserError: twice the bytes were wrong, or there is no progress.
        Refused: the server does not give the file.
    """
    kind = "sha256" if partial.git is None else "git sha1"
    with requests.Session() as session:
        session.auth = _as_it_is
        for last in (False, True):
            try:
                _complete(name, url, partial, session, token, patience)
                found = partial.git or partial.sha256
            except _Different as error:
                found = str(error)
            if found == expected:
                return
            partial.restart()
            if not last:
                print(
                    f"{name}: expected {kind} {expected}, found {found}; fetching it once more",
                    flush=True,
                )
    raise UserError(
        f"{name}: expected {kind} {expected}, found {found}, also when fetched once more; the "
        "server or a proxy damages it: run again later or over another network"
    )


def _complete(
    name: str,
    url: str,
    partial: Partial,
    session: requests.Session,
    token: str | None,
    seconds: float,
) -> None:
    """Fetch until all bytes are there."""
    patience = Patience(name, seconds)
    most, refusals = partial.done, 0
    while partial.done < partial.size:
        try:
            _receive(url, partial, session, token)
            if partial.done == partial.size:
                return
            failure = _Later("the connection was cut")
        except _Later as error:
            failure = error
        except Refused as error:
            refusals += 1
            if not error.elsewhere or refusals == _STORAGE_REFUSALS:
                raise
            failure = _Later(f"HTTP {error.status} from the storage")
        if partial.done > most:
            most = partial.done
            patience.progress()
        patience.wait(f"{failure} at {partial.done:,} of {partial.size:,} bytes", failure.wait)


def _receive(url: str, partial: Partial, session: requests.Session, token: str | None) -> None:
    """Send one request and take what its answer brings."""
    headers = {"Accept-Encoding": "identity"}
    if partial.done:
        headers["Range"] = f"bytes={partial.done}-"
        if partial.etag and not partial.etag.startswith("W/"):  # a weak one is not allowed there
            headers["If-Range"] = partial.etag
    response, elsewhere = _get(url, session, headers, token)
    with response:
        status, etag = response.status_code, response.headers.get("ETag")
        if status in PASSING:
            raise _Later(f"HTTP {status}", told_wait(response.headers))
        if status == 416:
            partial.restart()
            raise _Later("the server has no such range; beginning again")
        if status == 206:
            content = re.fullmatch(
                r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "")
            )
            if not content or int(content[1]) != partial.done:
                partial.restart()
                raise _Later("not the range that was asked for; beginning again")
            if partial.etag and etag and partial.etag != etag:
                partial.restart()
                raise _Later("the file changed on the server; beginning again")
            total = content[3]
        elif status == 200:
            partial.restart(etag)  # also where a range was asked for
            total = response.headers.get("Content-Length", "*")
        else:
            raise Refused(status, response.headers.get("X-Error-Code"), elsewhere)
        if total.isdigit() and int(total) != partial.size:
            raise _Different(f"a file of {int(total):,} bytes in place of {partial.size:,}")
        _append(response, partial)


def _append(response: requests.Response, partial: Partial) -> None:
    while True:
        try:
            block = response.raw.read1(_READ_BYTES)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Later(_short(error)) from None
        if not block:
            return
        if partial.done + len(block) > partial.size:
            raise _Different(f"more than {partial.size:,} bytes")
        partial.append(block)


def _get(
    url: str, session: requests.Session, headers: Mapping[str, str], token: str | None
) -> tuple[requests.Response, bool]:
    """The answer to a GET, redirects followed; whether it is another server's."""
    first = _origin(url)
    for _ in range(_MAX_REDIRECTS):
        here = _origin(url) == first
        secret = {"Authorization": f"Bearer {token}"} if token and here else {}
        try:
            response = session.get(
                url,
                headers={**headers, **secret},
                stream=True,
                allow_redirects=False,
                timeout=_TIMEOUTS,
            )
        except requests.RequestException as error:
            raise _Later(_short(error)) from None
        if not response.is_redirect:
            return response, not here
        response.close()
        url = urljoin(url, response.headers["Location"])
    raise _Later("redirected again and again")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """In place of what `requests` would do: replace the token by a password of `~/.netrc`."""
    return request


def _short(error: Exception) -> str:
    """What happened, without the address: that of the storage is signed, a secret."""
    text = repr(error).lower()
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError) or "timed out" in text:
        return f"no byte for {_TIMEOUTS[1]:.0f} s"
    for word, meaning in (
        ("reset", "the connection was reset"),
        ("refused", "the connection was refused"),
        ("resol", "the host is not known"),
        ("incompleteread", "the connection was cut"),
    ):
        if word in text:
            return meaning
    return type(error).__name__

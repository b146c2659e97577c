"""Source `hub`: the files of a Hugging Face dataset repository at a commit.

The hub's own client makes three kinds of requests: for the commit of the revision, for the card,
which names the configurations, and for the listing of the configuration's folder, with the size and
hash of each file.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from pipeline.download.http import RETRY_STATUSES, Patience, Refused, fetch, retry_after
from pipeline.download.hub_configs import find_files, read_card
from pipeline.download.left_out import LeftOut
from pipeline.download.partial_file import PartialFile
from pipeline.format.manifest import Source, check_relative
from pipeline.params import SourceParams
from pipeline.runtime.errors import UserError, printable

CARD = "README.md"
DEFAULT_ENDPOINT = "https://huggingface.co"
_TIMEOUT = 30.0  # seconds without a byte
_MAX_CONNECTS = 3  # then the address is wrong, or there is no network
_MAX_FILES = 1_000_000  # of a folder
_MAX_PATH = 1_000  # characters
_MAX_CARD_BYTES = 1 << 23
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


def endpoint() -> str:
    """Return the hub's address: the current value of `HF_ENDPOINT`, or the default."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a commit; see `ingest.SourceItem`."""

    path: str
    size: int
    sha256: str | None
    """The sha256 that the hub lists; None for a small file that is not in LFS."""
    git: str
    """The git blob hash."""
    url: str
    repo: str
    commit: str
    token: str | None = field(repr=False)

    @property
    def identity(self) -> str:
        """A name for the bytes: their sha256 or git blob hash."""
        return self.sha256 or f"git-{self.git}"

    @property
    def local_path(self) -> None:
        """None: the file is remote."""

    def fetch(self, folder: Path, patience: float) -> tuple[Path, str]:
        """Download the file's missing bytes to ``folder``; return its path and sha256.

        Raises:
            UserError: The hub refuses the file, or its bytes are wrong.
        """
        with PartialFile(folder, self.size, git=self.sha256 is None) as partial:
            expected = self.sha256 or self.git
            try:
                fetch(self.path, self.url, partial, expected, self.token, patience)
            except Refused as error:
                where = f"{self.path}: storage: " if error.redirected else f"{self.path}: "
                # Not from HF_ENDPOINT, which may differ on the node where this runs.
                hub = self.url.partition("/datasets/")[0]
                reason = explain_refusal(
                    error.status, error.code, self.repo, self.commit, self.token, hub
                )
                raise UserError(where + reason) from None
            return partial.path, partial.sha256


def explain_refusal(
    status: int, code: str | None, repo: str, revision: str, token: str | None, hub: str
) -> str:
    """Explain a refusal of ``hub`` with `X-Error-Code` ``code`` in one line, and how to fix it."""
    if code == "GatedRepo":
        state = "HF_TOKEN's account has no access" if token else "HF_TOKEN is not set"
        return (
            f"source.repo: {repo} is gated and {state}; accept its conditions at "
            f"{hub}/datasets/{repo}, and set HF_TOKEN to a token of that account"
        )
    if code == "RevisionNotFound":
        return (
            f"source.revision: {repo} has no branch, tag or commit {revision!r} (squashing a "
            f"history removes old commits); choose one of {hub}/datasets/{repo}/commits/main"
        )
    if code == "EntryNotFound":
        return f"{repo} has no such file at {revision}; check source.config and source.revision"
    if code == "RepoNotFound" or (status == 401 and not token):
        return (
            f"source.repo: {hub} has no dataset {repo!r}, or it is private; check the name, or set "
            "HF_TOKEN to a token with read access"
        )
    if status == 401:
        return f"HF_TOKEN: rejected by {hub} (401); create a new token at {hub}/settings/tokens"
    if status == 403:
        return f"HF_TOKEN: no access to {repo} (403); set it to a token with read access"
    if status == 404:
        return f"not found at {hub} (404); check source.repo {repo!r} and source.revision"
    return f"{hub} answers HTTP {status}; check source.repo {repo!r} and HF_ENDPOINT"


def resolve(
    params: SourceParams, patience: float, source: str = "main"
) -> tuple[Source, list[HubFile]]:
    """Find the commit that the parameters name, and the configuration's files, sorted by path.

    Raises:
        UserError: The hub is unavailable, or has no such repository, revision or configuration.
    """
    from huggingface_hub import HfApi, get_token, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    repo, token = params.repo, get_token()
    api = HfApi(endpoint=endpoint(), token=token or False)
    _set_timeouts()

    def call(request: Callable[[], T], where: str = "") -> T:
        return _call(request, params, token, patience, where)

    commit = call(lambda: api.dataset_info(repo, revision=params.revision, timeout=_TIMEOUT).sha)
    if not _is_id(commit, _SHA1):
        raise UserError(
            f"source.revision: {endpoint()} names no commit for {params.revision!r} of {repo}; set "
            "it to a commit, and check HF_ENDPOINT"
        )

    def url(path: str) -> str:
        return hf_hub_url(repo, path, repo_type="dataset", revision=commit, endpoint=endpoint())

    entries: dict[str, RepoFile] = {}

    def list_folder(folder: str, recursive: bool) -> list[str]:
        listed = call(
            lambda: list(
                islice(
                    api.list_repo_tree(
                        repo, folder or None, recursive=recursive, revision=commit,
                        repo_type="dataset",
                    ),
                    _MAX_FILES + 1,
                )
            ),
            f"folder {folder!r}",
        )  # fmt: skip
        files = [entry for entry in listed if isinstance(entry, RepoFile)]
        try:
            if len(listed) > _MAX_FILES:
                raise ValueError(f"more than {_MAX_FILES} entries")
            for entry in files:
                _check_entry(entry)
        except ValueError as error:
            raise UserError(
                f"source.repo: the listing of {repo}: {error}; use another repository, and check "
                "HF_ENDPOINT"
            ) from None
        entries.update({entry.path: entry for entry in files})
        return [entry.path for entry in files]

    card = call(lambda: _read_text(url(CARD), token))
    left_out = LeftOut(params.exclude, source)
    try:
        paths = find_files(read_card(card, repo), params.config, repo, list_folder, left_out)
    finally:
        left_out.report()
    files = [
        HubFile(
            path=path,
            size=entries[path].size,
            sha256=lfs.sha256 if (lfs := entries[path].lfs) else None,
            git=entries[path].blob_id,
            url=url(path),
            repo=repo,
            commit=commit,
            token=token,
        )
        for path in paths
    ]
    return Source(kind="hub", repo=repo, revision=commit, config=params.config), files


def _is_id(value: object, pattern: re.Pattern[str]) -> TypeGuard[str]:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _check_entry(entry: Any) -> None:
    """Check the types of what a hub lists of a file, which becomes paths, URLs and keys.

    Raises:
        ValueError: The entry cannot be right.
    """
    path, size, lfs = entry.path, entry.size, entry.lfs
    if not isinstance(path, str) or len(path) > _MAX_PATH:
        raise ValueError(f"a path of more than {_MAX_PATH} characters, or none")
    check_relative(path)
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise ValueError(f"{path!r} has no size")
    if not _is_id(entry.blob_id, _SHA1) or (lfs and not _is_id(lfs.sha256, _SHA256)):
        raise ValueError(f"{path!r} has no hash")


def _set_timeouts() -> None:
    """Set a timeout for all requests of the hub's client: its paged calls have none."""
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import hf_request_event_hook

    def set_timeout(request: httpx2.Request) -> None:
        request.extensions["timeout"] = httpx2.Timeout(_TIMEOUT).as_dict()

    set_client_factory(
        lambda: httpx2.Client(
            event_hooks={"request": [hf_request_event_hook, set_timeout]}, follow_redirects=True
        )
    )


def _read_text(url: str, token: str | None) -> str:
    """Return the text of a small file of the repository; empty if there is no such file."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(token=token or False)
    with get_session().stream("GET", url, headers=headers) as response:
        try:
            hf_raise_for_status(response)
        except EntryNotFoundError:
            return ""
        data = b""
        for block in response.iter_bytes():
            data += block
            if len(data) > _MAX_CARD_BYTES:
                raise ValueError(f"{CARD} is larger than {_MAX_CARD_BYTES >> 20} MiB")
    return data.decode(errors="replace")


def _call(
    request: Callable[[], T], params: SourceParams, token: str | None, seconds: float, where: str
) -> T:
    """Call the hub's client, with retries of temporary failures; return its result."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    patience, connects = Patience(endpoint(), seconds), 0
    while True:
        try:
            return request()
        except HfHubHTTPError as error:
            status, headers = error.response.status_code, error.response.headers
            if status not in RETRY_STATUSES:
                code, repo, revision = headers.get("X-Error-Code"), params.repo, params.revision
                reason = explain_refusal(status, code, repo, revision, token, endpoint())
                raise UserError(f"{where}: {reason}" if where else reason) from None
            patience.wait(f"HTTP {status}", retry_after(headers))
        except OfflineModeIsEnabled:
            raise UserError(
                "source.kind: hub needs the network, but HF_HUB_OFFLINE is set; unset it"
            ) from None
        except httpx2.TransportError as error:
            connects += isinstance(error, httpx2.ConnectError)
            reason = type(error).__name__
            if connects == _MAX_CONNECTS:
                raise UserError(
                    f"{endpoint()} cannot be reached ({reason}); check the network, the proxy "
                    "(HTTPS_PROXY) and HF_ENDPOINT"
                ) from None
            patience.wait(reason)
        except Exception as error:  # the client raises many types if the answer is of another form
            reason = printable(" ".join(str(error)[:1000].split()) or type(error).__name__)[:200]
            raise UserError(
                f"{endpoint()} does not answer like a hub ({reason}); check HF_ENDPOINT and "
                "source.repo"
            ) from None

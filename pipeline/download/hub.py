"""Source `hub`: a commit of a dataset repository of the Hugging Face hub, and its files.

Three questions are asked, by the hub's own client: which commit a revision is, what the card says
of the configurations, and what lies in the configuration's folder, with each file's size and hash.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.download.http import PASSING, Patience, Refused, fetch, told_wait
from pipeline.download.hub_configs import find_files, read_card
from pipeline.download.partial_file import Partial
from pipeline.format.manifest import Source, stay_inside
from pipeline.params import SourceParams
from pipeline.runtime.errors import UserError

CARD = "README.md"
DEFAULT_ENDPOINT = "https://huggingface.co"
_TIMEOUT = 30.0  # seconds without a byte
_CONNECTS = 3  # a hub that is never reached is a wrong address, or no network

T = TypeVar("T")


def endpoint() -> str:
    """The hub's address: `HF_ENDPOINT`, as the environment has it now."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a commit."""

    path: str
    size: int
    sha256: str | None
    """What the hub says that it is; None for a small file, that is not in LFS."""
    git: str
    """The name of its blob."""
    url: str
    repo: str
    commit: str
    token: str | None = field(repr=False)

    @property
    def identity(self) -> str:
        """What its bytes are known by."""
        return self.sha256 or f"git-{self.git}"

    @property
    def here(self) -> None:
        """It lies at the hub."""

    def space(self, folder: Path) -> int:
        """Bytes that it takes up on a disk."""
        return self.size

    def fetch(self, folder: Path, patience: float) -> tuple[Path, str]:
        """Bring it into ``folder``, or what is missing of it there; its path and sha256.

        Raises:
            UserError: it cannot be had, or its bytes are wrong.
        """
        with Partial(folder, self.size, git=self.sha256 is None) as partial:
            expected = self.sha256 or self.git
            try:
                fetch(self.path, self.url, partial, expected, self.token, patience)
            except Refused as error:
                where = f"{self.path}: " if not error.elsewhere else f"{self.path}: the storage: "
                # Not this process's HF_ENDPOINT: on another node that is another.
                hub = self.url.partition("/datasets/")[0]
                reason = refusal(error.status, error.code, self.repo, self.commit, self.token, hub)
                raise UserError(where + reason) from None
            return partial.path, partial.sha256


def refusal(
    status: int, code: str | None, repo: str, revision: str, token: str | None, hub: str
) -> str:
    """What to mend when the hub answers with a status of 400 or more, in one line.

    Args:
        code: its `X-Error-Code`.
        hub: its address.
    """
    if code == "GatedRepo":
        state = "HF_TOKEN's account has no access" if token else "HF_TOKEN is not set"
        return (
            f"source.repo: {repo} is gated and {state}: accept its conditions at "
            f"{hub}/datasets/{repo}, and set HF_TOKEN to a token of that account"
        )
    if code == "RevisionNotFound":
        return (
            f"source.revision: {repo} has no branch, tag or commit {revision!r} (old ones "
            f"vanish when a history is squashed); see {hub}/datasets/{repo}/commits/main"
        )
    if code == "EntryNotFound":
        return f"{repo} has no such file at {revision}; check source.config and source.revision"
    if code == "RepoNotFound" or (status == 401 and not token):
        return (
            f"source.repo: no dataset {repo!r} at {hub}, or it is private: check the name, and set "
            f"HF_TOKEN to a token that may read it"
        )
    if status == 401:
        return f"{hub} does not accept the HF_TOKEN (401): make a new one at {hub}/settings/tokens"
    if status == 403:
        return f"{hub} forbids access to {repo} (403): set HF_TOKEN to a token that may read it"
    if status == 404:
        return f"not found at {hub} (404): check source.repo {repo!r} and source.revision"
    return f"{hub} answers HTTP {status}; check source.repo {repo!r} and HF_ENDPOINT"


def resolve(params: SourceParams, patience: float) -> tuple[Source, list[HubFile]]:
    """The commit that the parameters name, and the files of the configuration in it, by path.

    Raises:
        UserError: the hub does not give them, or the parameters name what is not there.
    """
    from huggingface_hub import HfApi, get_token, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    repo, token = params.repo, get_token()
    api = HfApi(endpoint=endpoint(), token=token or False)
    _bound_waits()

    def ask(call: Callable[[], T], what: str = "") -> T:
        return _ask(call, params, token, patience, what)

    commit = ask(lambda: api.dataset_info(repo, revision=params.revision, timeout=_TIMEOUT).sha)
    if not commit:
        raise UserError(f"{endpoint()} does not say which commit {params.revision!r} of {repo} is")

    def url(path: str) -> str:
        return hf_hub_url(repo, path, repo_type="dataset", revision=commit, endpoint=endpoint())

    entries: dict[str, RepoFile] = {}

    def tree(folder: str, deep: bool) -> list[str]:
        listed = ask(
            lambda: list(
                api.list_repo_tree(
                    repo, folder or None, recursive=deep, revision=commit, repo_type="dataset"
                )
            ),
            f"folder {folder!r}",
        )
        files = [entry for entry in listed if isinstance(entry, RepoFile)]
        for entry in files:
            try:
                stay_inside(entry.path)
            except ValueError as error:
                raise UserError(f"source.repo: the listing of {repo}: {error}; refused") from None
            entries[entry.path] = entry
        return [entry.path for entry in files]

    card = ask(lambda: _read(url(CARD), token))
    paths = find_files(read_card(card, repo), params.config, repo, tree)
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


def _bound_waits() -> None:
    """Have the hub's client never wait for ever: its paged calls set no time-out."""
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import hf_request_event_hook

    def bound(request: httpx2.Request) -> None:
        request.extensions["timeout"] = httpx2.Timeout(_TIMEOUT).as_dict()

    set_client_factory(
        lambda: httpx2.Client(
            event_hooks={"request": [hf_request_event_hook, bound]}, follow_redirects=True
        )
    )


def _read(url: str, token: str | None) -> str:
    """A small file of the repository as text; empty where there is none."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    response = get_session().get(url, headers=build_hf_headers(token=token or False))
    try:
        hf_raise_for_status(response)
    except EntryNotFoundError:
        return ""
    return response.text


def _ask(
    call: Callable[[], T], params: SourceParams, token: str | None, seconds: float, what: str
) -> T:
    """What a call of the hub's client returns, tried again where that may help."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    patience, connects = Patience(endpoint(), seconds), 0
    while True:
        try:
            return call()
        except HfHubHTTPError as error:
            status, headers = error.response.status_code, error.response.headers
            if status not in PASSING:
                revision = params.revision
                code = headers.get("X-Error-Code")
                reason = refusal(status, code, params.repo, revision, token, endpoint())
                raise UserError(f"{what}: {reason}" if what else reason) from None
            patience.wait(f"HTTP {status}", told_wait(headers))
        except OfflineModeIsEnabled:
            raise UserError("HF_HUB_OFFLINE is set, and the hub is to be asked: unset it") from None
        except httpx2.TransportError as error:
            connects += isinstance(error, httpx2.ConnectError)
            reason = type(error).__name__
            if connects == _CONNECTS:
                raise UserError(
                    f"{endpoint()} cannot be reached ({reason}): check the network, the proxy "
                    "(HTTPS_PROXY) and HF_ENDPOINT"
                ) from None
            patience.wait(reason)
        except (ValueError, KeyError, TypeError, httpx2.InvalidURL) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{endpoint()} does not answer as a hub does ({reason}): check HF_ENDPOINT and "
                "source.repo"
            ) from None

"""The Hugging Face hub: download a model, upload an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.errors import FormatError


def download(name: str) -> Path:
    """Download the config and the weights of a model; return their folder.

    Raises:
        FormatError: `huggingface_hub` is not installed, or there is no such model.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FormatError(
            f"{name} is not a folder: give one, or install huggingface_hub to use a name on the Hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors*"]))
    except Exception as error:  # the client's errors have no common base class
        raise FormatError(
            f"{name} is not a folder, and downloading it from the Hub failed: {error}"
        ) from error


def upload(folder: Path, names: Sequence[str], repo: str) -> str:
    """Upload files of a folder, as one commit, to a model repository; return the commit's address.

    A repository that does not exist is created, visible only to its owner. The client finds the
    token: in `HF_TOKEN`, or where `hf auth login` has stored it.

    Raises:
        FormatError: `huggingface_hub` is not installed, or the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise FormatError(f"--push {repo}: install huggingface_hub") from error
    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(names),
            commit_message="Upload a model exported by model.export",
        )
    except Exception as error:  # the client's errors have no common base class
        raise FormatError(
            f"--push {repo}: {error}; {folder} is complete; set HF_TOKEN to a token that may write "
            "to the repository, then repeat the command"
        ) from error
    return str(commit.commit_url)

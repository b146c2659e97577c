"""From the name of a configuration to files of a repository, as `datasets` does it.

The card of a dataset repository (the head of its README.md) may name configurations, each with file
patterns for each split. Where it says nothing, `datasets` guesses the splits from the file names.
The training split is taken. Everything here is computed from the card and the listing: no network,
and no code of the repository.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from pipeline.download.to_parquet import FORMATS, PARQUET, suffix_of
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import nearest

# The files below a folder, or those in it alone.
Tree = Callable[[str, bool], list[str]]

_WILD = re.compile(r"[*?\[]")


def read_card(text: str, repo: str) -> dict[str, dict[str, Any]]:
    """The configurations that a card names, in its order; none where it is silent.

    Raises:
        UserError: the card's metadata cannot be read.
    """
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        card = DatasetCard(text, ignore_metadata_errors=True)
        return MetadataConfigs.from_dataset_card_data(card.data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"source.repo: the card of {repo} cannot be read ({reason})") from None


def find_files(
    configs: Mapping[str, dict[str, Any]], config: str | None, repo: str, tree: Tree
) -> list[str]:
    """The paths of a configuration's files of a known format, sorted.

    Args:
        config: its name; None for the repository's default.
        tree: lists the files of the repository.

    Raises:
        UserError: there is no such configuration, or it has no such files.
    """
    chosen = _choose(configs, config, repo)
    base = str(chosen.get("data_dir") or "").strip("/")
    if (data_files := chosen.get("data_files")) is not None:
        patterns = [_join(base, pattern) for pattern in _training(data_files, repo)]
        listed = sorted({path for p in patterns for path in tree(*_folder_of(p))})
    else:
        listed = sorted(tree(base, True))
        patterns = _guess(listed, base, repo)
    for pattern in patterns:
        if "://" in pattern:
            raise UserError(f"source.config: {repo} names files elsewhere ({pattern}); not taken")
    matched = _match(listed, patterns)
    parquet = [path for path in matched if suffix_of(path) in PARQUET]
    files = parquet or [path for path in matched if suffix_of(path) in FORMATS]
    if not files:
        raise UserError(
            f"source.config: {config or 'the default'} of {repo} has no files of a known format "
            f"({', '.join(patterns)})"
        )
    return files


def _choose(
    configs: Mapping[str, dict[str, Any]], config: str | None, repo: str
) -> Mapping[str, Any]:
    names = list(configs)
    if config is None:
        default = [n for n in names if n == "default" or configs[n].get("default")] or names
        if len(default) > 1:
            raise UserError(
                f"source.config: {repo} has no default configuration; name one: {_few(names)}"
            )
        return configs[default[0]] if default else {}
    if config in configs:
        return configs[config]
    if names:
        raise UserError(f"source.config: {repo} has no {config!r}; {nearest(config, names)}")
    if config == "default":
        return {}
    raise UserError(
        f"source.config: the card of {repo} names no configurations, so none is {config!r}; "
        "set it to null"
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _training(data_files: Any, repo: str) -> list[str]:
    """The patterns of the split `train`, or of the only one."""
    from datasets.data_files import sanitize_patterns

    splits = sanitize_patterns(data_files)
    if "train" not in splits and len(splits) != 1:
        raise UserError(
            f"source.config: no split of {repo} is called train; there are {_few(list(splits))}"
        )
    patterns: Iterable[Any] = splits.get("train") or next(iter(splits.values()))
    return [str(pattern) for pattern in patterns]


def _guess(paths: list[str], base: str, repo: str) -> list[str]:
    """The patterns that `datasets` takes where a card gives none, by trying its own on the list."""
    from datasets.data_files import _get_data_files_patterns

    def resolver(pattern: str) -> list[str]:
        return _match(paths, [_join(base, pattern)])

    try:
        patterns = _get_data_files_patterns(resolver)
    except FileNotFoundError:
        raise UserError(f"source.repo: {repo} has no data files") from None
    return [_join(base, pattern) for pattern in _training(patterns, repo)]


def _join(base: str, pattern: str) -> str:
    if "://" in pattern or not base:
        return pattern.removeprefix("./")
    return f"{base}/{pattern}"


def _folder_of(pattern: str) -> tuple[str, bool]:
    """The folder that all matches of a pattern lie in, and whether they lie deeper."""
    parts = PurePosixPath(pattern).parts
    fixed = 0
    while fixed < len(parts) - 1 and not _WILD.search(parts[fixed]):
        fixed += 1
    return "/".join(parts[:fixed]), len(parts) - fixed > 1 or "**" in parts[-1]


def _match(paths: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Those that a pattern matches as fsspec's glob would, none hidden."""
    from fsspec.utils import glob_translate

    matchers = [re.compile(glob_translate(pattern)) for pattern in patterns]
    return [
        path
        for path in paths
        if any(matcher.match(path) for matcher in matchers)
        and not any(part.startswith((".", "__")) for part in PurePosixPath(path).parts)
        and path.rpartition("/")[2] not in ("README.md", "dataset_infos.json")
    ]

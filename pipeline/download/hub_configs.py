"""The files of a dataset repository's configuration, found as `datasets` finds them.

The card of a repository (the metadata in its README.md) may name configurations, each with file
patterns per split; otherwise `datasets` guesses the splits from the file names. Only the training
split is used. Everything is computed from the card and the listing, without network access and
without running the repository's code.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from pipeline.download.left_out import AUXILIARY, UNKNOWN, LeftOut, is_auxiliary
from pipeline.download.to_parquet import FORMATS, PARQUET, suffix_of
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import nearest

# (folder, recursive) -> paths of the files in the folder.
ListFolder = Callable[[str, bool], list[str]]

_FORMATS = (*PARQUET, *FORMATS)
_WILDCARD = re.compile(r"[*?\[]")


def read_card(text: str, repo: str) -> dict[str, dict[str, Any]]:
    """Return the configurations of a card, in its order; empty if it names none.

    Raises:
        UserError: The card's metadata cannot be read.
    """
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        card = DatasetCard(text, ignore_metadata_errors=True)
        configs: dict[str, dict[str, Any]] = MetadataConfigs.from_dataset_card_data(card.data)
        return configs
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"source.repo: the card of {repo} is not readable ({reason}); use another repository "
            "or source.revision"
        ) from None


def find_files(
    configs: Mapping[str, dict[str, Any]],
    config: str | None,
    repo: str,
    list_folder: ListFolder,
    left_out: LeftOut,
) -> list[str]:
    """Return the sorted paths of a configuration's files, of the format that `datasets` takes.

    Args:
        configs: The configurations that the card names.
        config: The configuration's name; None for the repository's default.
        left_out: Holds `source.exclude`, and gets the files that are not taken.

    Raises:
        UserError: There is no such configuration, or it has no such files.
    """
    chosen = _select_config(configs, config, repo)
    base = str(chosen.get("data_dir") or "").strip("/")
    everything: set[str] = set()

    def listing(folder: str, recursive: bool) -> set[str]:
        listed = sorted(set(list_folder(folder, recursive)))
        everything.update(listed)
        return {path for path in listed if not left_out.excludes(path)}

    if (data_files := chosen.get("data_files")) is not None:
        patterns = [_join(base, pattern) for pattern in _training_patterns(data_files, repo)]
        if elsewhere := [pattern for pattern in patterns if "://" in pattern]:
            raise UserError(
                f"source.config: {repo} refers to files elsewhere ({elsewhere[0]}); use "
                "source.kind files with their URLs in source.paths"
            )
        listed = {path for p in patterns for path in listing(*_folder_of(p))}
        wanted = patterns
        for pattern in patterns:
            if not _WILDCARD.search(pattern) and pattern not in everything:
                raise UserError(
                    f"source.config: {repo} has no file {pattern}, which its card names; choose "
                    "another configuration or source.revision"
                )
    else:
        listed = listing(base, True)
        if left_out.n_excluded and not listed:
            raise left_out.nothing_left()
        patterns = _guess_patterns(listed, base, repo)
        wanted = [_join(base, "**")]
    matched = _match(listed, patterns)
    for path in _match(listed.difference(matched), wanted, every=True):
        if suffix_of(path) in _FORMATS:
            hidden = is_auxiliary(path, base)
            left_out.add(AUXILIARY if hidden else "not in the training split", path)
    return _of_one_format(matched, f"source.config: {config or 'the default'} of {repo}", left_out)


def _of_one_format(paths: list[str], where: str, left_out: LeftOut) -> list[str]:
    """Return the files of the format that `datasets` takes: the one of the most common suffix."""
    from datasets.load import infer_module_for_data_files_list
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    usable = [path for path in paths if suffix_of(path) in _FORMATS]
    if not usable and left_out.n_excluded:
        raise left_out.nothing_left()
    if not usable:
        raise UserError(f"{where}: no file of a known format; choose another configuration")
    # `datasets` would download archives to look into them.
    archives = [path for path in paths if path.lower().endswith(".zip")]
    module, _ = infer_module_for_data_files_list(sorted(set(paths).difference(archives)))

    def is_taken(path: str) -> bool:
        return module is None or _EXTENSION_TO_MODULE.get(suffix_of(path), (None,))[0] == module

    files = [path for path in usable if is_taken(path)]
    if len(archives) > len(files):
        files, module = [], "zip"
    if not files:
        raise UserError(
            f"{where}: `datasets` takes its {module} files, which are not read here; list them in "
            "source.exclude to take the others"
        )
    for path in sorted(set(paths).difference(files)):
        left_out.add(f"not {module}, which `datasets` takes" if path in usable else UNKNOWN, path)
    return files


def _select_config(
    configs: Mapping[str, dict[str, Any]], config: str | None, repo: str
) -> Mapping[str, Any]:
    names = list(configs)
    if config is None:
        default = [n for n in names if n == "default" or configs[n].get("default")] or names
        if len(default) > 1:
            raise UserError(
                f"source.config: {repo} has no default configuration; set it to one of "
                f"{_shorten(names)}"
            )
        return configs[default[0]] if default else {}
    if config in configs:
        return configs[config]
    if names:
        raise UserError(
            f"source.config: {repo} has no configuration {config!r}; {nearest(config, names)}"
        )
    if config == "default":
        return {}
    raise UserError(
        f"source.config: no configuration {config!r}: the card of {repo} names none; set it to null"
    )


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _training_patterns(data_files: Any, repo: str) -> list[str]:
    """Return the patterns of the split `train`, or of the only split."""
    from datasets.data_files import sanitize_patterns

    splits = sanitize_patterns(data_files)
    if "train" not in splits and len(splits) != 1:
        raise UserError(
            f"source.config: {repo} has no split train, only {_shorten(list(splits))}; choose "
            "another configuration"
        )
    patterns: Iterable[Any] = splits.get("train") or next(iter(splits.values()))
    return [str(pattern) for pattern in patterns]


def _guess_patterns(paths: Iterable[str], base: str, repo: str) -> list[str]:
    """Return the patterns that `datasets` uses if the card names none."""
    from datasets.data_files import _get_data_files_patterns

    def resolver(pattern: str) -> list[str]:
        return _match(paths, [_join(base, pattern)])

    try:
        patterns = _get_data_files_patterns(resolver)
    except FileNotFoundError:
        raise UserError(f"source.repo: {repo} has no data files; use another repository") from None
    return [_join(base, pattern) for pattern in _training_patterns(patterns, repo)]


def _join(base: str, pattern: str) -> str:
    if "://" in pattern or not base:
        return pattern.removeprefix("./")
    return f"{base}/{pattern}"


def _folder_of(pattern: str) -> tuple[str, bool]:
    """Return the folder of all matches of a pattern, and whether to list it recursively."""
    parts = PurePosixPath(pattern).parts
    fixed = 0
    while fixed < len(parts) - 1 and not _WILDCARD.search(parts[fixed]):
        fixed += 1
    return "/".join(parts[:fixed]), len(parts) - fixed > 1 or "**" in parts[-1]


def _match(paths: Iterable[str], patterns: Iterable[str], every: bool = False) -> list[str]:
    """Return the sorted paths that match a pattern as in fsspec's glob.

    Args:
        every: Whether to include files that are hidden, auxiliary, or describe the repository.
    """
    from datasets.data_files import FILES_TO_IGNORE
    from fsspec.utils import glob_translate

    matchers = [(pattern, re.compile(glob_translate(pattern))) for pattern in patterns]

    def is_ignored(path: str, pattern: str) -> bool:
        name = path.rpartition("/")[2]
        described = name in FILES_TO_IGNORE and name != pattern.rpartition("/")[2]
        return described or is_auxiliary(path, pattern)

    return sorted(
        path
        for path in paths
        if any(
            matcher.match(path) and (every or not is_ignored(path, pattern))
            for pattern, matcher in matchers
        )
    )

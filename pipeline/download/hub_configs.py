"""The files of a dataset repository's configuration, found as `datasets` finds them.

The card of a repository (the metadata in its README.md) may name configurations, each with file
patterns per split; otherwise `datasets` guesses the splits from the file names. Only the training
split is used. Everything is computed from the card and the listing, without network access and
without running the repository's code.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from pipeline.download.left_out import AUXILIARY, UNKNOWN, LeftOut, is_auxiliary
from pipeline.download.to_parquet import FORMATS, PARQUET, suffix_of
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.params_file import nearest
from pipeline.runtime.yaml_size import check_size

# (folder, recursive) -> paths of the files in the folder.
ListFolder = Callable[[str, bool], list[str]]

_FORMATS = (*PARQUET, *FORMATS)
_WILDCARD = re.compile(r"[*?\[]")
_NOT_LITERAL = re.compile(r"[*?/]|\[!?\]?[^\]]*\]")
_MAX_WORK = 300_000_000  # of comparing paths with patterns: some seconds
_MAX_PATTERN = 1_000  # characters
# The ends of huggingface_hub's REGEX_YAML_BLOCK, which in some versions takes quadratic time.
_CARD_START = re.compile(r"\s*---(?:\r\n|\r|\n)")
_CARD_END = re.compile(r"(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")


def read_card(text: str, repo: str) -> dict[str, dict[str, Any]]:
    """Return the configurations of a card, in its order; empty if it names none.

    Raises:
        UserError: The card's metadata cannot be read.
    """
    import yaml  # type: ignore[import-untyped]  # as `datasets` does
    from datasets.utils.metadata import MetadataConfigs

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        metadata = _metadata(text)
        check_size(yaml.parse(metadata, Loader=loader))
        configs = MetadataConfigs.from_dataset_card_data(yaml.load(metadata, Loader=loader) or {})
        return {str(name): dict(config) for name, config in configs.items()}
    except Exception as error:  # the parsers raise many types
        raise _unreadable(error, repo) from None


def _metadata(text: str) -> str:
    """Return the YAML at the start of a card, between two lines of `---`; empty if it has none."""
    text = text.removeprefix("\ufeff")
    start = _CARD_START.match(text)
    end = start and _CARD_END.search(text, start.end())
    return text[start.end() : end.start()] if start and end else ""


def _unreadable(error: Exception, repo: str) -> UserError:
    reason = printable(" ".join(str(error)[:1000].split()) or type(error).__name__)[:200]
    return UserError(
        f"source.repo: the card of {repo} is not readable ({reason}); use another repository or "
        "source.revision"
    )


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
                f"source.config: {repo} refers to files elsewhere ({printable(elsewhere[0])}); use "
                "source.kind files with their URLs in source.paths"
            )
        folders = dict.fromkeys(map(_folder_of, patterns))
        listed = {path for folder in folders for path in listing(*folder)}
        wanted = patterns
        for pattern in patterns:
            if not _WILDCARD.search(pattern) and pattern not in everything:
                raise UserError(
                    f"source.config: {repo} has no file {printable(pattern)}, which its card "
                    "names; choose another configuration or source.revision"
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
            f"source.config: {repo} has no configuration {config!r}; "
            f"{printable(nearest(config, names))[:500]}"
        )
    if config == "default":
        return {}
    raise UserError(
        f"source.config: no configuration {config!r}: the card of {repo} names none; set it to null"
    )


def _shorten(names: list[str]) -> str:
    shown = ", ".join(printable(name)[:100] for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _training_patterns(data_files: Any, repo: str) -> list[str]:
    """Return the patterns of the split `train`, or of the only split."""
    from datasets.data_files import sanitize_patterns

    try:
        splits = sanitize_patterns(data_files)
    except Exception as error:  # of several types
        raise _unreadable(error, repo) from None
    if "train" not in splits and len(splits) != 1:
        raise UserError(
            f"source.config: {repo} has no split train, only {_shorten(list(splits))}; choose "
            "another configuration"
        )
    patterns = [str(pattern) for pattern in splits.get("train") or next(iter(splits.values()))]
    if long := [pattern for pattern in patterns if len(pattern) > _MAX_PATTERN]:
        raise _unreadable(ValueError(f"a pattern of {len(long[0])} characters"), repo)
    return patterns


def _guess_patterns(paths: Iterable[str], base: str, repo: str) -> list[str]:
    """Return the patterns that `datasets` uses if the card names none."""
    from datasets.data_files import _get_data_files_patterns

    def resolver(pattern: str) -> list[str]:
        return _match(paths, [_join(base, pattern)])

    try:
        patterns = _get_data_files_patterns(resolver)
    except FileNotFoundError:
        raise UserError(f"source.repo: {repo} has no data files; use another repository") from None
    except (ValueError, AssertionError) as error:  # the name of a split
        raise _unreadable(error, repo) from None
    return [_join(base, pattern) for pattern in _training_patterns(patterns, repo)]


def _join(base: str, pattern: str) -> str:
    if "://" in pattern or not base:
        return pattern.removeprefix("./")
    return f"{base}/{pattern}"


def _folder_of(pattern: str) -> tuple[str, bool]:
    """Return the folder of all matches of a pattern, and whether to list it recursively."""
    parts = PurePosixPath(pattern).parts or ("",)
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

    known = dict.fromkeys(paths)
    patterns = list(patterns)
    wildcards = map(len, map(_WILDCARD.findall, patterns))
    if len(known) * sum(30 + (1 + count) ** 3 for count in wildcards if count) > _MAX_WORK:
        raise UserError(
            f"source.config: {len(known)} files are too many for the patterns of the card (the "
            f"first: {printable(patterns[0])[:100]}); choose another configuration or repository"
        )
    matched: set[str] = set()
    for pattern in patterns:
        found: Iterable[str] = {pattern} & known.keys()
        if _WILDCARD.search(pattern):
            literal = max(_NOT_LITERAL.split(pattern), key=len)
            found = filter(_matcher(pattern), [path for path in known if literal in path])
        for path in found:
            name = path.rpartition("/")[2]
            described = name in FILES_TO_IGNORE and name != pattern.rpartition("/")[2]
            if every or not (described or is_auxiliary(path, pattern)):
                matched.add(path)
    return sorted(matched)


def _matcher(pattern: str) -> Callable[[str], object]:
    """Return a function that matches a path as fsspec's glob does, in bounded time.

    fsspec's regular expression is the fastest way, but needs exponential time for many wildcards.
    """
    from fsspec.utils import glob_translate

    parts = pattern.split("/")
    choices = sum(1 if part == "**" else max(0, part.count("*") - 1) for part in parts)
    if choices <= 2 and all(part == "**" or "**" not in part for part in parts):
        return re.compile(glob_translate(pattern)).match

    def matches(path: str) -> bool:
        names = path.split("/")
        ends = {0}  # numbers of names that the parts so far can stand for
        for part in parts:
            if part == "**":
                ends = set(range(min(ends), len(names)))
            else:
                ends = {
                    end + 1
                    for end in ends
                    if end < len(names) and (part == "*" or fnmatchcase(names[end], part))
                }
            if not ends:
                return False
        return parts[-1] == "**" or len(names) in ends

    return matches

"""Pages of documentation that programs write a part of."""


def replace_between(text: str, begin: str, end: str, part: str) -> str:
    """Replace what is between two markers, each on a line of its own.

    Raises:
        ValueError: The text has no such markers.
    """
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no {begin} ... {end}")
    return f"{before}{begin}\n{part}\n{end}{after}"

"""The characters on which both engines are proven to agree, and a test of documents for others.

GPT-2's pattern, which cuts text into words, asks of a character only its class: letter, number,
space or other. Two encoders differ where their Unicode tables differ: on characters that one of the
two versions of Unicode had not yet assigned. So a set of characters is proven to be cut alike, one
by one and in each context that the pattern distinguishes (tests/pipeline/tokenize/test_engines.py).
A document with a character outside the set goes to the reference.

The set consists of complete blocks of 64 code points: in UTF-8 all bytes of a character but the
last identify its block, so characters need not be decoded.
"""

from functools import lru_cache

import numpy as np

# First and last code points, in complete blocks of 64. The others are rare in web text, or near
# ranges where Unicode still grows (Telugu, Kannada, Malayalam; the CJK extensions beyond A).
PROVEN = (
    (0x0000, 0x083F),  # Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Syriac, Thaana, N'Ko
    (0x0900, 0x0BFF),  # Devanagari, Bengali, Gurmukhi, Gujarati, Oriya, Tamil
    (0x0E00, 0x11FF),  # Thai, Lao, Tibetan, Myanmar, Georgian, Hangul Jamo
    (0x1E00, 0x2BFF),  # Latin and Greek with marks, punctuation, currencies, arrows, mathematics
    (0x2E00, 0x9FFF),  # CJK punctuation and radicals, kana, bopomofo, ideographs
    (0xAC00, 0xD7BF),  # Hangul; the surrogates after it are not characters
    (0xE000, 0xFFFF),  # private use, compatibility and presentation forms, U+FFFD
    (0x1D400, 0x1D7FF),  # mathematical letters and digits
    (0x1F000, 0x1FAFF),  # emoji and other pictures
)

_BLOCK = 64


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Build the lookup tables of `unproven`.

    Returns:
        (65536,) bool by the first two bytes of a character, ``lead << 8 | second``: whether it is
        unproven or has four bytes; (17408,) bool by block: whether it is proven.
    """
    proven = np.zeros(0x110000 // _BLOCK, dtype=bool)
    for first, last in PROVEN:
        proven[first // _BLOCK : last // _BLOCK + 1] = True
    suspect = np.ones((256, 256), dtype=bool)
    second = np.arange(0x80, 0xC0)
    for lead in range(0xC2, 0xE0):
        suspect[lead, second] = not proven[lead & 0x1F]
    for lead in range(0xE0, 0xF0):
        suspect[lead, second] = ~proven[(lead & 0x0F) << 6 | second & 0x3F]
    return suspect.reshape(-1), proven


def unproven(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Find the documents that have a character outside `PROVEN`.

    Args:
        data: (n,) uint8, valid UTF-8.
        offsets: (d + 1,) int64, ascending: document i is ``data[offsets[i] : offsets[i + 1]]``.

    Returns:
        (d,) bool.
    """
    suspect, proven = _tables()
    leads = _leads(data, int(offsets[0]), int(offsets[-1]))
    pairs = data[leads].astype(np.uint16) << 8 | data[leads + 1]
    leads = leads[suspect[pairs]]
    if len(leads):
        four = leads[data[leads] >= 0xF0]
        blocks = (
            (data[four].astype(np.int64) & 0x07) << 12
            | (data[four + 1].astype(np.int64) & 0x3F) << 6
            | data[four + 2] & 0x3F
        )
        leads = np.concatenate([leads[data[leads] < 0xF0], four[~proven[blocks]]])
    found = np.zeros(len(offsets) - 1, dtype=bool)
    found[np.searchsorted(offsets, leads, side="right") - 1] = True
    return found


def _leads(data: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Return where the characters of more than one byte begin in ``data[begin:end]``.

    Most text is ASCII, so ASCII is skipped eight bytes at a time.
    """
    first, last = -(-begin // 8), end // 8
    if first >= last:
        return np.flatnonzero(data[begin:end] >= 0xC2) + begin
    words = data[8 * first : 8 * last].view(np.uint64)
    found = np.flatnonzero((words & np.uint64(0x8080808080808080)) != 0)
    if len(found) > len(words) // 16:
        return np.flatnonzero(data[begin:end] >= 0xC2) + begin
    candidates = np.concatenate(
        [
            np.arange(begin, 8 * first),
            (8 * (found[:, None] + first) + np.arange(8)).reshape(-1),
            np.arange(8 * last, end),
        ]
    )
    leads: np.ndarray = candidates[data[candidates] >= 0xC2]
    return leads

"""Damaged and forged bytes for the parsers of stored files."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Few examples: each test runs in a second, and the damage of single bits is tried elsewhere.
FEW = settings(
    max_examples=40,
    deadline=1000,  # milliseconds: no input may keep a parser busy
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

DEEP_JSON = b"[" * 100_000

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Draw ``good`` with a few bytes changed, removed, inserted or cut off, or other bytes."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "insert", "remove", "cut", "other"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "cut":
            del data[at:]
        else:
            data[:] = draw(st.sampled_from([DEEP_JSON, b"", b"null", b"[]", b"{}", b"\xff\x00"]))
    return bytes(data)

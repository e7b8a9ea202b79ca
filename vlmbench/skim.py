"""The fast way to read a stored line for tables: what no table shows is not parsed, and long lists only when somebody asks.

`record.SampleRecord.from_line` says what a line means; a line that is spelt in another way than it is written there is
left to it as a whole, so that both ways read the same.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_TOKEN = re.compile(
    rb'"first_token":\{"ids":\[([^]]*)\],"logprobs":\[([^]]*)\],"tail":(-?[0-9.]+(?:[eE][-+]?[0-9]+)?|null)\}'
)
_WORK = re.compile(rb'"work":\{"tokens":\[[^]]*\],"pairs":\[[^]]*\],"neurons":\[[^]]*\]')
_FRAMES = re.compile(rb'"frames":\[([^]]*)\]')


class StoredToken(Mapping[str, Any]):
    """A first token as its line spells it: reads like the dict that the plain way gives, which is made at every look."""

    __slots__ = ("_ids", "_logprobs", "arrays", "tail")

    def __init__(self, ids: bytes, logprobs: bytes, tail: bytes) -> None:
        self._ids, self._logprobs = ids, logprobs
        self.tail = None if tail == b"null" else float(tail)
        self.arrays: tuple[np.ndarray, np.ndarray] | None = None
        """ids and logprobs, each [k], once `read_arrays` was asked for them."""

    @property
    def likeliest(self) -> list[int]:
        """The first of its ids, in a list; an empty one where there is none."""
        return [int(self._ids.partition(b",")[0])] if self._ids else []

    def __getitem__(self, name: str) -> Any:
        if name == "tail":
            return self.tail
        return json.loads(b"[%b]" % {"ids": self._ids, "logprobs": self._logprobs}[name])

    def __iter__(self) -> Iterator[str]:
        return iter(("ids", "logprobs", "tail"))

    def __len__(self) -> int:
        return 3

    __hash__ = None  # type: ignore[assignment]  # equal to a dict, so no more to be hashed than one


def read_arrays(tokens: Sequence[StoredToken]) -> None:
    """Fill in `StoredToken.arrays` of those that have none, all at once. Raises `ValueError` where no number stands."""
    new = [each for each in tokens if each.arrays is None]
    if new:
        ids, logprobs = _numbers([each._ids for each in new], int), _numbers([each._logprobs for each in new], float)
        for each, *own in zip(new, ids, logprobs, strict=True):
            each.arrays = (own[0], own[1])


def _numbers(texts: Sequence[bytes], kind: type) -> list[np.ndarray]:
    """The numbers of each text, which stand between commas."""
    import numpy as np

    counts = [text.count(b",") + 1 if text else 0 for text in texts]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # how numpy complained before it raised
            found: np.ndarray = np.fromstring(b",".join(filter(None, texts)), dtype=kind, sep=",")
        if len(found) != sum(counts):
            raise ValueError
    except (ValueError, DeprecationWarning):
        raise ValueError("a first token holds what is not a number") from None
    return [found[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))]


def skimmed(line: bytes) -> tuple[bytes, StoredToken | None, int]:
    """The line without what is not parsed; its first token where it had one; and how many frames it had.

    Inside a JSON string every quote is escaped, so none of these names is ever found in one. The first `first_token` and
    the last `frames` are the record's own: what stands before and behind holds texts and counts, and no lists.
    """
    parts, done, token, n_frames = [], 0, None, 0
    found = _TOKEN.match(line, max(0, line.find(b'"first_token":')))
    if found and _finite(found[0]):
        token = StoredToken(*found.groups())
        start, end = found.span()
        parts += [line[:start], b'"first_token":null']
        done = end
    found = _WORK.match(line, max(done, line.find(b'"work":', done)))
    if found and _finite(found[0]):
        start, end = found.span()
        parts += [line[done:start], b'"work":{"tokens":[],"pairs":[],"neurons":[]']
        done = end
    found = _FRAMES.match(line, max(done, line.rfind(b'"frames":[', done)))
    if found and _finite(found[1]):
        start, end = found.span()
        parts += [line[done:start], b'"frames":[]']
        done, n_frames = end, line.count(b"{", start, end)
    return b"".join((*parts, line[done:])), token, n_frames


def _finite(text: bytes) -> bool:
    """Neither NaN nor Infinity is in it, which no record may hold: else all of it is read, and refused."""
    return b"N" not in text and b"I" not in text

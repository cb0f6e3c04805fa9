"""Values of fuzzers, and how long these run: ``GRAFT_FUZZ=20`` makes it 20 times as long, and random."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

_FACTOR = int(os.environ.get("GRAFT_FUZZ", "1"))


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """Runs a test of hypothesis with so many examples, times ``GRAFT_FUZZ``."""
    return settings(
        max_examples=examples * _FACTOR,
        derandomize=_FACTOR == 1,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(Phase.explicit, Phase.generate) if _FACTOR == 1 else tuple(Phase),
        suppress_health_check=list(HealthCheck),
    )


#: Names and texts of users: of other languages, with characters that mean something to hydra and to shells.
TEXTS = st.one_of(
    st.sampled_from(["", " ", ".", "..", "~", "~nobody/x", "a=b", "a,b", "(x", "{y", "$z", "${seed}", "*"]),
    st.sampled_from(["\x00", "\n", "\u202e", "\U0001f600", "\udcff", "x" * 300, "y/" * 3000, "null", "none"]),
    st.text(alphabet="ab01=,(){}[]$'\"\\ :*?~.-\u00e9\u4e2d", max_size=12),
)
#: Numbers out of every range.
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 10**30, -(10**30), 2**63, 2**31, 1.5, -0.5, 1e300, 1e-300, float("nan"), float("inf")]
)
#: Whatever JSON can hold.
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=4,
)


@dataclasses.dataclass(frozen=True)
class Damage:
    """A change of a file.

    Attributes:
        kind: ``flip``, ``cut``, ``insert``, ``nest`` or ``json``.
        place: Where, in millionths of the file or of its values.
        value: What a value of JSON becomes.
    """

    kind: str
    place: int
    value: Any

    def apply(self, data: bytes) -> bytes:
        """The damaged content."""
        at = self.place * len(data) // 1_000_000
        if self.kind == "flip":
            return (
                data[:at] + bytes(byte ^ (1 << self.place % 8) for byte in data[at : at + 1]) + data[at + 1 :]
            )
        if self.kind == "cut":
            return data[:at]
        if self.kind == "insert":
            return data[:at] + json.dumps(self.value).encode(errors="replace") + data[at:]
        if self.kind == "nest":
            return data[:at] + b"[" * 100_000
        return self._json(data)

    def _json(self, data: bytes) -> bytes:
        try:
            content = json.loads(data)
        except ValueError:  # no JSON: then its bytes are replaced
            return json.dumps(self.value).encode(errors="replace")
        places = list(_places(content))
        holder, key = places[self.place * len(places) // 1_000_001]
        holder[key] = self.value
        return json.dumps(content).encode(errors="replace")


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value in JSON."""
    pairs = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in list(pairs):
        yield content, key
        yield from _places(value)


DAMAGES = st.builds(
    Damage,
    st.sampled_from(["flip", "cut", "insert", "nest", "json", "json", "json"]),
    st.integers(0, 999_999),
    JSON,
)

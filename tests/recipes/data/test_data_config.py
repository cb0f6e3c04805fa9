"""DataConfig: what pydantic makes of it, and its messages."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from recipes.data.config import DataConfig


def test_pydantic_reads_it_and_refuses_unknown_keys() -> None:
    adapter = TypeAdapter(DataConfig)
    assert adapter.validate_python({"path": ["a.txt", "b.txt"], "seq_len": 64}).path == ["a.txt", "b.txt"]
    assert adapter.validate_python({}) == DataConfig()
    with pytest.raises(ValidationError, match="sequence_length"):
        adapter.validate_python({"sequence_length": 64})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seq_len", 0, "seq_len=0: must be at least 1. Give"),
        ("validation_fraction", 0.0, "validation_fraction=0.0: must lie between 0 and 1.*validation_path"),
        ("validation_fraction", 1.0, "validation_fraction=1.0: must lie between 0 and 1"),
        ("seed", -1, "seed=-1: must not be negative. Give 0 or more"),
        ("text_key", "", "text_key='': is empty. Name"),
        ("path", "", "path='': is empty. Name files or a glob"),
        ("path", [], r"path=\[\]: is empty. Name files or a glob"),
        ("validation_path", "", "validation_path='': is empty"),
    ],
)
def test_bad_values(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{field: value})


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ValueError, match="seq_len=0.*\n.*seed=-2"):
        DataConfig(seq_len=0, seed=-2)

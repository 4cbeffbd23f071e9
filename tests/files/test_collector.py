"""Python's collector of cycles: off while a plan is made, on while it is executed, and afterwards as it was."""

from __future__ import annotations

import gc

import pytest

from weights_conversion.files.collector import with_collector, without_collector


@pytest.mark.parametrize("before", [True, False])
def test_as_it_was(before: bool) -> None:
    if not before:
        gc.disable()
    try:
        with without_collector(), without_collector():
            assert not gc.isenabled()
            with with_collector():
                assert gc.isenabled() is before
            assert not gc.isenabled()
        with pytest.raises(ValueError, match="within"), without_collector(), with_collector():
            raise ValueError("within")
        assert gc.isenabled() is before
        with with_collector():
            assert gc.isenabled() is before
    finally:
        gc.enable()


def test_a_conversion_leaves_it_as_it_was(to_megatron, tmp_path) -> None:
    to_megatron("llama2", "--model-path", tmp_path / "gone", "--out", tmp_path / "out").refused("gone")
    assert gc.isenabled()

"""Everything public teaches by an example, and what the example shows is what happens."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from small_models import triple

import ires_kernels as ik
from ires_kernels.tensors import ops


@pytest.mark.parametrize("name", ik.__all__)
def test_the_example_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Examples begin in a folder that has the models base, instruct and target."""
    triple(tmp_path)
    monkeypatch.chdir(tmp_path)
    public = getattr(ik, name)
    known = {**vars(ops), "ik": ik, "torch": torch}
    examples = [test for test in doctest.DocTestFinder(recurse=False).find(public, name, globs=known) if test.examples]
    assert examples
    for example in examples:
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0

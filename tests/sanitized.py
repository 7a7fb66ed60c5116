"""A plugin for pytest that makes sure that the sanitized extension is the one under test."""

from __future__ import annotations

from pathlib import Path

from ires_kernels import _native


def pytest_configure() -> None:
    path = Path(_native.__file__)
    assert "sanitize" in path.parts, f"{path} is not the sanitized build"
    assert b"__asan_init" in path.read_bytes(), f"{path} was built without AddressSanitizer"

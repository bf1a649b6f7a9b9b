"""Workarounds for third-party packages, one per file.

Each file names the versions it was tried on and the test in `tests/unit/test_compat.py` that fails once the workaround
is no longer needed.
"""

"""A part of the acceptance that yields two figures and crashes."""

from tools.acceptance.part import at_most, note


def run(setting):
    yield note("before the crash", 1)
    yield at_most("not a number", float("nan"), 1.0)
    raise RuntimeError("planted")

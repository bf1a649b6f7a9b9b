"""A part of the acceptance that yields one figure and does not end."""

import time

from tools.acceptance.part import note


def run(setting):
    yield note("before the wait", 1)
    time.sleep(3600)

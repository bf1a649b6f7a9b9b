"""Rehearsing a launch in one process: what every rank would hold, without any memory being taken."""

"""Sampling of groups, scoring, and assembly of what a loss needs."""

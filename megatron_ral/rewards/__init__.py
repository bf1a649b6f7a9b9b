"""Rewards: strings in, floats out."""

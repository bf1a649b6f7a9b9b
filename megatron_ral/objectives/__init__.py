"""Losses as lists of terms that an engine calls back."""

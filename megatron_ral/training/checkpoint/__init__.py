"""Checkpoints of a run: files, writing in a thread, resuming in any layout, trained weights by Hugging Face name."""

"""The loop: `step.py` is one step in order (read it first), `objective.py` the losses, `trainer.py` the run."""

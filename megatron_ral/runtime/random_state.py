"""Global random generators of a process.

Training draws from none of them, because its random streams are functions of (seed, step, prompt). A user's own reward
function may draw from them. They are therefore seeded, stored with every checkpoint, and restored on the same ranks of
the same layout.
"""

import base64
import random
from typing import Any, cast

import numpy as np
import torch


def seed_random_state(seed: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's generators from the run's seed and the rank."""
    number = (seed * 1_000_003 + rank) % 2**32
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def random_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators as JSON."""
    name, keys, *rest = cast(Any, np.random.get_state())
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": _text(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

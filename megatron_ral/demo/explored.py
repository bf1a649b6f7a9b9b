"""Arms, data and supervised settings of the comparisons of explored attention.

Shared by the study `tools/study_explored.py` and the short comparison `tools/explore_tiny.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ral.demo.runs import curve

BASE = (
    "loss.kl_coef=0.0",
    "loss.attention_layers=[0,1,2,3]",  # a base model may search in any of them
    "optimizer.decay=constant",
    "optimizer.learning_rate=3.0e-4",
)
OFF = ("loss.attention_coef=0.0",)
DECIDING = ("loss.attention_keys=visual", "loss.attention_rows=deciding")
RATIO = ("loss.attention_grad_ratio=1.0",)
WEIGHT = ("loss.attention_coef=10.0",)  # about a ratio of 1, without the second backward pass that a ratio takes
NOISE = (
    "rollout.attention_noise.sigma=16.0",
    "rollout.attention_noise.shared=true",
    "rollout.attention_noise.decay=linear",
)
PULL = ("loss.attention_negative_weight=0.0",)  # towards where right responses looked, and nowhere away from
VIEWS = ("rollout.views.keep=0.3", "rollout.generation_batch_size=128")
SHUFFLED = ("loss.attention_advantages=shuffled",)
LITERAL = ("loss.attention_layers=[-1]", "loss.attention_coef=1.0")
WORDS = (
    'reward.functions.words={path: "megatron_ral.demo.thoughts:other_colour", weight: -0.9}',
)  # a right answer behind another colour earns nothing
SEARCHING = "loss.attention_layers=SEARCHING"
"""Pull in the layers that looked at the asked cell before the wrong lessons (`searching_layers`), for which the word
stands."""


@dataclass(frozen=True)
class Arm:
    """One way to train from the start."""

    title: str
    settings: tuple[str, ...]
    on_request: bool = False
    """Run only where it is named, or on the tuning seeds: a candidate, or a question of its own."""


def _target(name: str, *more: tuple[str, ...]) -> tuple[str, ...]:
    return (f"loss.attention_target={name}", *DECIDING, *(setting for part in more for setting in part))


# A coefficient, because a ratio to the gradient of the tokens is 0 where no group is mixed.
_ORACLE = ("loss.attention_coef=0.3", "loss.attention_row=predictor", "loss.attention_divergence=forward_kl")
ARMS = {
    "grpo": Arm("GRPO", OFF),
    "grpo_warm": Arm("GRPO, temperature 1.5", (*OFF, "rollout.temperature=1.5")),
    "contrast": Arm("contrast of explored attention", _target("contrast", WEIGHT, NOISE, PULL)),
    "contrast_shuffled": Arm("contrast, success shuffled", _target("contrast", WEIGHT, NOISE, PULL, SHUFFLED)),
    "noise": Arm("noise alone", (*OFF, *NOISE)),
    "explored": Arm("explored attention in the paper's divergence", _target("explored", RATIO, NOISE, PULL)),
    "oracle": Arm("annotated cell (control)", _target("oracle", _ORACLE)),
    "explored_shuffled": Arm("explored, advantages shuffled", _target("explored", RATIO, NOISE, PULL, SHUFFLED)),
    "contrast_quiet": Arm("contrast without noise", _target("contrast", WEIGHT, PULL)),
    "literal": Arm("RAL as published", LITERAL),
    "views": Arm("contrast of partial views", _target("contrast", WEIGHT, VIEWS, PULL)),
    "views_shuffled": Arm("partial views, success shuffled", _target("contrast", WEIGHT, VIEWS, PULL, SHUFFLED)),
    "evidence": Arm(
        "annotated cell after success (EASE)", _target("evidence", RATIO, ("loss.attention_row=predictor",))
    ),
}
for _name, _of, *_changed in (
    ("grpo@lr=6e-4", "grpo", "optimizer.learning_rate=6.0e-4"),
    ("grpo@lr=1.5e-4", "grpo", "optimizer.learning_rate=1.5e-4"),
    ("grpo_warm@lr=6e-4", "grpo_warm", "optimizer.learning_rate=6.0e-4"),
    ("grpo@temperature=2", "grpo", "rollout.temperature=2.0"),
    ("contrast@lr=6e-4", "contrast", "optimizer.learning_rate=6.0e-4"),
    ("contrast@lr=1.5e-4", "contrast", "optimizer.learning_rate=1.5e-4"),
    ("contrast@sigma=8", "contrast", "rollout.attention_noise.sigma=8.0"),
    ("contrast@lead=1", "contrast", "rollout.attention_noise.sigma=1.0", "rollout.attention_noise.scale=lead"),
    ("contrast@negative=0.3", "contrast", "loss.attention_negative_weight=0.3"),
    ("contrast@negative=1", "contrast", "loss.attention_negative_weight=1.0"),
    ("explored@negative=1", "explored", "loss.attention_negative_weight=1.0"),
    ("oracle@ratio=1", "oracle", "loss.attention_grad_ratio=1.0"),
    ("oracle@coef=3", "oracle", "loss.attention_coef=3.0"),
    ("contrast@ratio=1", "contrast", "loss.attention_grad_ratio=1.0"),
    ("contrast@coef=4", "contrast", "loss.attention_coef=4.0"),
    ("contrast@coef=25", "contrast", "loss.attention_coef=25.0"),
    ("contrast@constant", "contrast", "rollout.attention_noise.decay=constant"),
    ("contrast@own-noise", "contrast", "rollout.attention_noise.shared=false"),
    ("contrast@grid=0", "contrast", "rollout.attention_noise.grid=0"),
    ("contrast@grid=2", "contrast", "rollout.attention_noise.grid=2"),
    ("contrast@grid=4", "contrast", "rollout.attention_noise.grid=4"),
    *(
        (
            f"{arm}@grids={','.join(map(str, grids))}",
            arm,
            "rollout.attention_noise.grid=0",
            f"rollout.attention_noise.grids={grids}",
        )
        for arm, grids in (("contrast", [2, 4]), ("contrast", [2, 3, 4, 6]), ("noise", [2, 3, 4, 6]))
    ),
    *((f"{arm}@layers=1", arm, "loss.attention_layers=[1]") for arm in ("contrast", "oracle")),
    (
        "contrast@layers=1@noise=1",
        "contrast",
        "loss.attention_layers=[1]",
        "rollout.attention_noise.layers=[1]",
    ),
    *((f"{arm}@searching", arm, SEARCHING) for arm in ("contrast", "oracle")),
    *(
        (f"{arm}@focused", arm, SEARCHING, "rollout.attention_noise.layers=SEARCHING")
        for arm in ("contrast", "contrast_shuffled", "noise")
    ),
    ("contrast@adaptive=2", "contrast", "rollout.attention_noise.adaptive=2"),
    (
        "contrast@sigma=4@adaptive=3",
        "contrast",
        "rollout.attention_noise.sigma=4.0",
        "rollout.attention_noise.decay=constant",
        "rollout.attention_noise.adaptive=3",
    ),
    ("noise@adaptive=2", "noise", "rollout.attention_noise.adaptive=2"),
    *(
        (f"{arm}@words", arm, *WORDS)
        for arm in ("grpo", "grpo_warm", "contrast", "contrast_shuffled", "noise", "oracle")
    ),
    *((f"{arm}@kl=0.04", arm, "loss.kl_coef=0.04") for arm in ("grpo_warm", "contrast", "noise")),
    ("noise@sigma=8", "noise", "rollout.attention_noise.sigma=8.0"),
    ("noise@constant", "noise", "rollout.attention_noise.decay=constant"),
):
    ARMS[_name] = Arm(_name, (*ARMS[_of].settings, *_changed), on_request=True)


def arm_settings(arm: str, noise: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the settings of an arm. Of two for one key the later one holds.

    Args:
        noise: settings that an arm with noise has in addition, where it does not choose for itself.
    """
    by_key = {setting.split("=")[0]: setting for setting in (*BASE, *ARMS[arm].settings)}
    if any("attention_noise" in setting for setting in ARMS[arm].settings):
        for setting in noise:
            by_key.setdefault(setting.split("=")[0], setting)
    return tuple(by_key.values())


SEARCH_DATA = ("--grid", 3, "--digits", 2, "--num-colours", 9, "--bias", 0.99, "--bias-by", "colour")
"""Options of tools/make_digit_search.py: 100 answers, and wrong lessons that show the cell of the next colour."""
VIDEO_DATA = ("--scenes", 9, "--grid", 1, "--digits", 2, "--num-colours", 9, "--bias", 0.99, "--bias-by", "colour")
"""The same of tools/make_video_search.py: the cells of a picture one after the other."""
LESSON_SIZE = 32
"""Samples of a supervised step."""
CURVES = {
    "accuracy": "eval/accuracy",
    **{f"gaze_{layer}": f"eval/target_deciding/layer_{layer}" for layer in range(4)},
    "equal": "frac_reward_zero_std",
    "ratio": "attention/grad_ratio",
    "format": "eval/format_rate",
}
"""Name of a curve -> its tag. `gaze_N` is the share of the asked cell in layer N's attention to the picture, at the row
that predicts the answer."""


def read_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all curves of a finished run."""
    return {name: curve(run, tag) for name, tag in CURVES.items()}


def searching_layers(share: Callable[[int], float], cells: int = 9) -> list[int]:
    """Return the layers that look at the asked cell at least twice as much as chance.

    Args:
        share: share of the asked cell in a layer, when the model had learned to search.
        cells: number of cells.
    """
    return [layer for layer in range(4) if share(layer) >= 2 / cells]


def searching_layer(share: Callable[[int], float]) -> int:
    """Return the layer that looks at the asked cell most.

    Args:
        share: share of the asked cell in a layer, when the model had learned to search.
    """
    return max(range(4), key=share)

"""Settings of earlier versions that were removed. A file that names one where it had no effect still loads.

Such files exist wherever an earlier version wrote all settings out, above all as `config.yaml` in checkpoints.
"""

from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional

from megatron_ral.errors import ConfigError

Tree = Mapping[str, Any]
"""Mapping of sections, as a file holds them."""


@dataclass(frozen=True)
class Retired:
    """One removed setting, or one removed value of a setting."""

    key: str
    """Setting as `section.name`."""
    value: Optional[str]
    """Removed value; None where the setting itself is gone."""
    had_effect: Callable[[Tree], bool]
    """Condition on the rest of the file under which the setting changed a run."""
    remedy: str


def _given(tree: Tree, key: str, default: Any) -> Any:
    section, _, name = key.partition(".")
    held = tree.get(section)
    return held.get(name, default) if isinstance(held, Mapping) else default


def _is_rl(tree: Tree) -> bool:
    return _given(tree, "train.algorithm", "ral") == "ral"


RETIRED: tuple[Retired, ...] = (
    Retired("loss.attention_target", "ema", _is_rl, "was removed; use reference, which is frozen, or old"),
    Retired(
        "loss.attention_target",
        "group",
        _is_rl,
        "was removed; use hindsight, which compares with the successful responses of a group as well",
    ),
    Retired(
        "loss.attention_ema_decay",
        None,
        lambda tree: _is_rl(tree) and _given(tree, "loss.attention_target", "old") == "ema",
        "was removed together with loss.attention_target = ema; delete the setting",
    ),
    Retired(
        "loss.kl_estimator",
        "k1",
        lambda tree: _is_rl(tree) and _given(tree, "loss.kl_coef", 0.04) != 0,
        "was removed, because its expected gradient is 0; use k2 or k3",
    ),
)
"""All removed settings, a removed value before the settings that only acted with it."""


def drop_retired(tree: dict, strict: bool = False) -> None:
    """Delete removed settings without effect from a mapping of sections, in place.

    Args:
        tree: mapping of sections.
        strict: refuse them even without effect, because somebody has just asked for them.

    Raises:
        ConfigError: a removed setting had an effect.
    """
    found = [
        rule for rule in RETIRED if (value := _given(tree, rule.key, None)) is not None and rule.value in (None, value)
    ]
    for rule in found:  # all are judged before any is deleted, because their conditions look at each other
        if strict or rule.had_effect(tree):
            raise ConfigError(rule.key, _given(tree, rule.key, None), rule.remedy)
    for rule in found:
        section, _, name = rule.key.partition(".")
        del tree[section][name]

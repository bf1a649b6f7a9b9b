"""Samples of a source that take part, chosen from headers and indexes before anything is read, and the report of it."""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Optional, Sequence

import numpy as np

from megatron_ral.data.index import UNKNOWN, ShardIndex
from megatron_ral.data.issues import REASONS

logger = logging.getLogger(__name__)

LimitCheck = Callable[[int, int], Optional[tuple[str, str]]]
"""f(prompt length, visual tokens) -> (reason, text) of the limit that a prompt passes, or None."""


@dataclass(frozen=True)
class Admission:
    """Samples of one source that take part."""

    numbers: tuple[np.ndarray, ...]
    """Ascending int64 sample numbers, one array per shard."""
    lengths: tuple[np.ndarray, ...]
    """Prompt lengths of these samples; empty if a shard has no usable index."""
    filtered: Counter[str]
    """Number of samples that are too long by their index, by reason."""


def admit_samples(indexes: Sequence[ShardIndex], fingerprint: str, limit_passed: LimitCheck) -> Admission:
    """Choose the samples without a fault that are not too long by their index.

    Args:
        indexes: shards of the source.
        fingerprint: fingerprint of the run's own processor; lengths with another one are not believed.
        limit_passed: limits of a prompt.
    """
    numbers, lengths, filtered = [], [], Counter()
    for index in indexes:
        admitted = [sample for sample in range(len(index)) if sample not in index.faults]
        if index.prompt_lengths is not None and index.fingerprint == fingerprint:
            admitted = [sample for sample in admitted if _fits(index, sample, limit_passed, filtered)]
            lengths.append(index.prompt_lengths[admitted])
        numbers.append(np.array(admitted, dtype=np.int64))
    return Admission(tuple(numbers), tuple(lengths) if len(lengths) == len(numbers) else (), filtered)


def _fits(index: ShardIndex, sample: int, limit_passed: LimitCheck, filtered: Counter[str]) -> bool:
    assert index.prompt_lengths is not None and index.visual_tokens is not None  # the index has both or none
    prompt_length, visual_tokens = int(index.prompt_lengths[sample]), int(index.visual_tokens[sample])
    if prompt_length == UNKNOWN:
        return True
    reason = limit_passed(prompt_length, visual_tokens)
    if reason is not None:
        filtered[reason[0]] += 1
    return reason is None


def report_admission(
    key: str, indexes: Sequence[ShardIndex], fingerprint: str, admission: Admission, group_by_length: bool
) -> None:
    """Warn of indexes without usable lengths, of samples left out, and of faults that headers show.

    Args:
        key: setting that names the source.
        indexes: shards of the source.
        fingerprint: fingerprint of the run's own processor.
        admission: choice of `admit_samples`.
        group_by_length: `data.group_by_length`, which needs the lengths.
    """
    consequence = (
        "prompts are measured when they are decoded"
        + (", and data.group_by_length has no effect" if group_by_length else "")
        + "; tools/index_shards.py makes indexes"
    )
    unknown = [index for index in indexes if index.prompt_lengths is None]
    if unknown:
        logger.warning(
            "%s: the index of %d of %d shards is %s (first: '%s'); headers were read instead, %s",
            key,
            len(unknown),
            len(indexes),
            unknown[0].note,
            unknown[0].shard,
            consequence,
        )
    foreign = [index for index in indexes if index.prompt_lengths is not None and index.fingerprint != fingerprint]
    if foreign:
        logger.warning(
            "%s: the index of %d of %d shards was made with another tokenizer, image processor or data.prompt_suffix "
            "(first: '%s'); %s",
            key,
            len(foreign),
            len(indexes),
            foreign[0].shard,
            consequence,
        )
    for reason, count in admission.filtered.items():
        logger.warning(
            "%s: %d of %d samples are left out by their index: %s",
            key,
            count,
            sum(map(len, indexes)),
            REASONS[reason],
        )
    for index in indexes:
        if index.damage:
            logger.warning("shard '%s': %s; the samples before are used", index.shard, index.damage)
        for fault in index.faults.values():
            logger.warning("quarantined: %s", fault.text)

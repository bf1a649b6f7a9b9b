"""Prompts of a replica: its first rank decodes them, and the other ranks get them over the network.

A replica is the ranks that together hold one copy of the model (tensor x pipeline). They work on the same prompts. Each
of them reads the encoded sample from its shard, which takes little and keeps foreign bytes off the network. Tensors are
sent as bytes behind their types and shapes. Nothing is pickled.
"""

from typing import Callable, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.data.issues import SampleError
from megatron_ral.parallel.collectives import broadcast_in_replica, is_first_of_replica
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.types import Patches, Prompt, Sample

_TENSORS = (
    "input_ids",
    "position_ids",
    "grid_thw",
    "is_video",
    "seconds_per_grid",
    "visual_mask",
    "target_mask",
    "response_ids",
)


class ReplicaPeers:
    """Ranks of one replica, which share prompts.

    Args:
        process_groups: process groups; None: this rank is alone.
    """

    def __init__(self, process_groups: Optional[ProcessGroups] = None):
        self._process_groups = process_groups
        self.decodes = process_groups is None or is_first_of_replica(process_groups)
        """True if this rank makes the prompts of its replica."""
        self._levels: dict[bytes, Tensor] = {}

    def share(self, items: Sequence[Prompt | Sample]) -> list[Prompt]:
        """Return the prompts of all ranks of the replica, which call this together.

        Args:
            items: prompts on the rank that decodes; on the others the samples that they are made of.
        """
        made = [item for item in items if isinstance(item, Prompt)]
        if self._process_groups is None or not items:
            return made
        sent = broadcast_in_replica([_tensors(prompt) for prompt in made], self._process_groups)
        if self.decodes:
            return made
        return [self._prompt(sample, tensors) for sample, tensors in zip(items, sent) if isinstance(sample, Sample)]

    def make(self, sample: Sample, make: Callable[[Sample], Prompt]) -> Prompt:
        """Return the prompt of a sample. All ranks of the replica call this together, and one of them makes it.

        Args:
            sample: The same sample on every rank.
            make: Maker of prompts.

        Raises:
            SampleError: The sample cannot be used. Every rank raises it.
            MemoryError: The sample does not fit into the memory of the rank that makes it, which alone raises this.
            RuntimeError: The network failed. This is no fault of the sample.
        """
        prompt, fault = None, SampleError("")
        if self.decodes:
            try:
                prompt = make(sample)
            except MemoryError:
                raise
            except Exception as error:  # decoders of foreign bytes may raise anything
                fault = SampleError(str(error), error.reason if isinstance(error, SampleError) else "unusable")
        if self._process_groups is not None:
            told = [_bytes(fault.reason), _bytes(str(fault))] if prompt is None else _tensors(prompt)
            [received] = broadcast_in_replica([told], self._process_groups)
            if not self.decodes and len(received) == 2:
                reason, text = (part.numpy().tobytes().decode() for part in received)
                fault = SampleError(text, reason)
            elif not self.decodes:
                prompt = self._prompt(sample, received)
        if prompt is None:
            raise fault
        return prompt

    def _prompt(self, sample: Sample, tensors: Sequence[Tensor]) -> Prompt:
        numbers, parts = tensors[len(_TENSORS)].tolist(), tensors[len(_TENSORS) + 1 :]
        # One table per kind of visual, because the vision tower looks up together what has the same table.
        levels = [self._levels.setdefault(table.numpy().tobytes(), table) for table in parts[1::2]]
        return Prompt(
            sample=sample,
            next_position=numbers[0],
            patches=tuple(map(Patches, parts[::2], levels, numbers[1:])),
            **dict(zip(_TENSORS, tensors)),
        )


def _bytes(text: str) -> Tensor:
    # Messages may quote names with undecodable bytes. An error here would leave the peers waiting.
    return torch.tensor(list(text.encode("utf-8", "backslashreplace")), dtype=torch.uint8)


def _tensors(prompt: Prompt) -> list[Tensor]:
    """Return the tensors and numbers of a prompt in the order that `ReplicaPeers` reads."""
    numbers = torch.tensor([prompt.next_position, *(part.repeats for part in prompt.patches)])
    parts = [tensor for part in prompt.patches for tensor in (part.pixels, part.levels)]
    return [*(getattr(prompt, name) for name in _TENSORS), numbers, *parts]

"""Rollout that a checkpoint holds for the next step (`rollout.overlap`), because its weights no longer exist.

Each data-parallel rank has one file with tensors and one with texts (`rollout_00000.safetensors`, `.json`), written by
the first rank of its copy of the model. Prompts are not saved: their places in the data are, and they are read again.
Groups belong to slots of the batch, so that another number of data-parallel ranks finds the groups it needs. Nothing is
pickled.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from megatron_ral.data.loader import PromptLoader
from megatron_ral.data.order import Place
from megatron_ral.engine.pipelined_decoder import PromptResponses
from megatron_ral.errors import CheckpointError, UserError
from megatron_ral.models.folder import read_json
from megatron_ral.parallel.collectives import raise_together
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.rollout.ahead import PendingRollout
from megatron_ral.rollout.collect import ScoredRollout
from megatron_ral.rollout.refill import ScoredGroups
from megatron_ral.training.checkpoint.files import read_manifest
from megatron_ral.types import Prompt, Score

Made = TypeVar("Made")
_COMPONENT = "component."
_ROWS = ("response_ids", "response_lengths", "rollout_logprobs", "finished")


def pending_files(pending: Optional[PendingRollout], layout: RankLayout, pad_token_id: int) -> dict[str, bytes]:
    """Return the contents of this rank's files by name. Empty without a rollout, and on ranks that write none."""
    if pending is None or layout.tensor_rank or layout.pipeline_rank:
        return {}
    groups, name = pending.scored.groups, _name(layout.data_rank)
    longest = max(row.response_ids.shape[1] for row in groups.responses)

    def column(field: str) -> Tensor:
        values = [getattr(row, field) for row in groups.responses]
        if values[0].dim() == 2:
            fill = pad_token_id if field == "response_ids" else 0
            values = [torch.nn.functional.pad(value, (0, longest - value.shape[1]), value=fill) for value in values]
        return torch.stack(values).contiguous()

    tensors = {field: column(field) for field in _ROWS}
    tensors |= {_COMPONENT + part: values.contiguous() for part, values in groups.score.components.items()}
    tensors["rewards"] = groups.score.rewards.contiguous()
    tensors["sampled_rewards"] = pending.scored.sampled_rewards.contiguous()
    tree = {
        "step": pending.step,
        "seconds": pending.seconds,
        "places": [[slot, place.source, place.shard, place.number] for slot, place in sorted(pending.places.items())],
        "identities": [prompt.sample.identity for prompt in groups.prompts],
        "from_teacher": groups.from_teacher,
        "versions": groups.versions,
        "texts": groups.score.texts,
        "problems": groups.score.problems,
    }
    return {f"{name}.safetensors": save(tensors), f"{name}.json": json.dumps(tree).encode()}


def restore_pending(checkpoint: Path, layout: RankLayout, loader: PromptLoader) -> PendingRollout:
    """Return the rollout of a checkpoint of any layout, on every rank. All ranks call this.

    Args:
        checkpoint: Folder of the checkpoint.
        layout: Layout of this run.
        loader: Loader whose position was restored.

    Raises:
        AgreedError: Some rank cannot read its part, or a sample is another one than when the rollout was made.
    """

    def together(read: Callable[[], Made]) -> Made:
        """Return what `read` returns. Every rank raises an error if it fails on one of them."""
        problem, made = None, None
        try:
            made = read()
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if not isinstance(error, UserError):
                error = CheckpointError(f"'{checkpoint}'", None, f"holds a rollout that cannot be read ({error})")
            problem = error
        raise_together(problem)
        return cast(Made, made)

    old_size = together(lambda: read_manifest(checkpoint).layout.data_size)
    files = cache(lambda rank: _Saved(checkpoint / _name(rank)))
    places = together(
        lambda: {slot: Place(*place) for slot, *place in files(layout.data_rank % old_size).tree["places"]}
    )
    prompts = together(lambda: loader.read(places))  # fails on all ranks alike, because they read it together
    return together(lambda: _put_together(files, old_size, layout, places, prompts))


def _put_together(
    files: Callable[[int], "_Saved"],
    old_size: int,
    layout: RankLayout,
    places: Mapping[int, Place],
    prompts: list[Prompt],
) -> PendingRollout:
    """Return the rollout.

    Args:
        files: Files of a data-parallel rank that saved it.
        old_size: Number of these ranks.
        layout: Layout of this run.
        places: Place of each slot's prompt, of all ranks.
        prompts: Prompts of this rank, by slot.
    """
    first, size = files(layout.data_rank % old_size).tree, layout.data_size
    slots = [slot for slot in sorted(places) if slot % size == layout.data_rank]
    rows = [files(slot % old_size).row(slot // old_size, prompt) for slot, prompt in zip(slots, prompts, strict=True)]
    responses, taught, versions, scores = zip(*rows)
    groups = ScoredGroups(
        prompts, list(responses), [None] * len(prompts), list(taught), list(versions), Score.join(scores)
    )
    # The rewards of replaced groups belong to nobody any more. Every file is read by one of the new ranks.
    own = [files(rank).tensors["sampled_rewards"] for rank in range(old_size) if rank % size == layout.data_rank]
    sampled = torch.cat([groups.score.rewards[:0], *own])
    return PendingRollout(first["step"], ScoredRollout(groups, sampled), dict(places), first["seconds"])


class _Saved:
    """Files of one data-parallel rank.

    Args:
        path: Path of both without their suffix.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors: Mapping[str, Tensor] = load_file(path.with_suffix(".safetensors"))
        self.tree: Mapping[str, Any] = read_json(path.with_suffix(".json"), "step", "places", "identities", "versions")

    def row(self, index: int, prompt: Prompt) -> tuple[PromptResponses, bool, int, Score]:
        """Return responses, whether they are the teacher's, version and score of one group.

        Args:
            index: Number of the group on the rank that saved it.
            prompt: Its prompt, read again.

        Raises:
            CheckpointError: It is not the prompt that was saved.
        """
        tree, found = self.tree, prompt.sample.identity
        if tree["identities"][index] != found:
            raise CheckpointError(
                f"'{self.path}.json'",
                None,
                f"has responses to sample '{tree['identities'][index]}', but the data now has '{found}' in its place; "
                "give the same shards, or start in another train.output_dir",
            )
        part = slice(index, index + 1)
        score = Score(
            self.tensors["rewards"][part],
            {
                name.removeprefix(_COMPONENT): values[part]
                for name, values in self.tensors.items()
                if name.startswith(_COMPONENT)
            },
            (tuple(tree["texts"][index]),),
            tuple(tuple(map(tuple, group)) for group in tree["problems"][part]),
        )
        ids, lengths, logprobs, finished = (self.tensors[field][index] for field in _ROWS)
        responses = PromptResponses(ids, lengths, logprobs, finished)
        return responses, tree["from_teacher"][index], tree["versions"][index], score


def _name(data_rank: int) -> str:
    return f"rollout_{data_rank:05d}"

"""Partial views: each response of a group is sampled from the picture with a random part of its cells left.

The responses of a group then really look at different places, without noise inside attention. Any sampler can do it,
because a view is a prompt of its own with other pixels. The update reads the whole picture. A hidden cell is painted in
the median colour of the pictures of its prompt. Source: this project.
"""

from dataclasses import replace
from typing import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ral.attention.exploration import visual_cells
from megatron_ral.config.sections import ViewsConfig
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import PromptResponses
from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.rollout.sampler import Sampler
from megatron_ral.types import Patches, Prompt


def visible_tokens(prompt: Prompt, group_size: int, settings: ViewsConfig, *identity: object) -> Tensor:
    """Return which visual tokens each response to a prompt sees, [G, visual tokens] bool.

    Every cell is kept with probability `keep`. Where none would be, the one that came closest is.

    Args:
        prompt: Prompt.
        group_size: Number G of responses.
        settings: Share and size of the cells that are kept.
        identity: Key of the random streams, such as seed and rollout.
    """
    cells = visual_cells(prompt, settings.grid)
    if not len(cells):
        return torch.zeros(group_size, 0, dtype=torch.bool)
    count, key = int(cells.max()) + 1, prompt.sample.identity
    views = []
    for g in range(group_size):
        draws = uniform_stream(count, "view", *identity, key, g)
        kept = (draws < settings.keep) | (draws == draws.min())
        views.append(kept[cells])
    return torch.stack(views)


def view_of(prompt: Prompt, seen: Tensor, number: int) -> Prompt:
    """Return a prompt whose hidden visual tokens show the median colour.

    Args:
        prompt: Prompt.
        seen: Mask of the visual tokens that stay, [visual tokens] bool.
        number: Number of the view, part of the identity of the new prompt.
    """
    sample = replace(prompt.sample, key=f"{prompt.sample.key}/view{number}")
    if not len(seen):
        return replace(prompt, sample=sample)
    # The patches of a visual token stand together.
    shown = seen.repeat_interleave(prompt.num_patches // len(seen)).split([len(part) for part in prompt.patches])
    colour = _median_colour(prompt.patches)
    return replace(
        prompt,
        sample=sample,
        patches=tuple(
            replace(part, pixels=torch.where(rows[:, None, None, None], part.pixels, colour))
            for part, rows in zip(prompt.patches, shown)
        ),
    )


def _median_colour(patches: Sequence[Patches]) -> Tensor:
    """Return the (lower) median byte of each channel over all pixels that the tower reads, [channels] uint8."""
    counts = sum(
        part.repeats * torch.stack([channel.flatten().bincount(minlength=256) for channel in part.pixels.unbind(-1)])
        for part in patches
    )
    assert isinstance(counts, Tensor), "a hidden token belongs to a picture"
    below = counts.cumsum(1)
    return (below < (below[:, -1:] + 1) // 2).sum(1).byte()


def sample_views(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    views: ViewsConfig,
    recorded_layers: frozenset[int],
    batch_size: int,
    *identity: object,
) -> Iterator[PromptResponses]:
    """Sample the responses of each group, each from a view of its own.

    Args:
        sampler: Source of responses.
        prompts: Prompts of this rank.
        sampling: Settings of the draws, for whole groups.
        views: Settings of the views.
        recorded_layers: Layers whose attention rows stand in the result: uniform over what a response saw.
        batch_size: Largest number of views in one batch.
        identity: Key of the random streams.

    Yields:
        Responses to each prompt, in order.
    """
    size, length = sampling.group_size, sampling.max_response_length
    seen = [visible_tokens(prompt, size, views, *identity) for prompt in prompts]
    # A generator, because the pixels of all views together would be `group_size` times those of the rollout.
    singles = (view_of(prompt, own[g], g) for prompt, own in zip(prompts, seen) for g in range(size))
    whole, done = iter(zip(prompts, seen)), list[PromptResponses]()
    for batch in sampler.sample(singles, replace(sampling, group_size=1), batch_size, *identity):
        done += PromptResponses.split(batch.responses)
        while len(done) >= size:
            group, done = done[:size], done[size:]
            prompt, own = next(whole)
            rows = _rows_of_views(prompt, own, length)
            attention: Mapping[int, Tensor] = dict.fromkeys(recorded_layers, rows)
            yield PromptResponses(
                torch.cat([_widen(row.response_ids, length, sampling.pad_token_id) for row in group]),
                torch.cat([row.response_lengths for row in group]),
                torch.cat([_widen(row.rollout_logprobs, length, 0.0) for row in group]),
                torch.cat([row.finished for row in group]),
                attention,
            )


def _widen(rows: Tensor, length: int, value: float) -> Tensor:
    return F.pad(rows, (0, length - rows.shape[1]), value=value)


def _rows_of_views(prompt: Prompt, seen: Tensor, length: int) -> Tensor:
    """Return rows that are uniform over what each response saw, [G, R, P + R] float32."""
    rows = torch.zeros(len(seen), len(prompt.input_ids) + length)
    rows[:, : len(prompt.input_ids)][:, prompt.visual_mask] = seen / seen.sum(dim=1, keepdim=True).clamp(min=1)
    return rows[:, None].expand(-1, length, -1)

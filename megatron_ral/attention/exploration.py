"""Exploration of attention while sampling: noise that moves the attention of a response inside the picture.

Each response gets noise of its own for every explored layer: one normal number per cell of the picture, equal for all
heads and all rows of the response. Responses of a group may divide the picture into cells of different sizes. The noise
is added to the scores towards visual keys, after which every head and row gets the attention mass back that it had on
the picture before:

    weight'(k) = weight(k) exp(sigma eps(k)) * M / M',   M = sum_k weight(k),   M' = sum_k weight(k) exp(sigma eps(k))

over the visual keys k. With `by_lead` sigma is multiplied by the lead of the head and row: the largest of its scores of
visual keys minus their mean. The noise then overcomes a sure gaze and an unsure one alike. All other weights stay what
they were, so that a response looks elsewhere in the picture and keeps its format. Added without this, the noise takes
attention from the text and breaks the format.

The noise depends on seed, rollout, prompt, response, layer and cell alone. It is therefore the same on every rank and
in every layout, and is drawn again where it is needed. Source: this project.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from megatron_ral.functional.sampling import normal_stream
from megatron_ral.types import Prompt, PromptBatch


@dataclass(frozen=True)
class ExplorationSettings:
    """Noise and recording of attention while responses are sampled."""

    sigma: float = 0.0
    """Standard deviation of the noise on attention scores, or with `by_lead` its multiple of the lead. 0: none."""
    noisy_layers: frozenset[int] = frozenset()
    """0-based layers with noise."""
    grids: tuple[int, ...] = (0,)
    """Cells along each side of an image or frame. 0: every visual token is a cell. Responses of a group take one of the
    grids each, in turn."""
    is_shared: bool = False
    """True if all layers of a response have the same noise."""
    by_lead: bool = False
    """True if the noise of a head and row is multiplied by the lead of its scores."""
    recorded_layers: frozenset[int] = frozenset()
    """0-based layers whose attention rows are recorded while decoding."""

    @property
    def is_noisy(self) -> bool:
        """Say whether any layer has noise."""
        return self.sigma > 0 and bool(self.noisy_layers)

    @property
    def is_on(self) -> bool:
        """Say whether decoding differs from plain decoding: with noise, or with rows to record."""
        return self.is_noisy or bool(self.recorded_layers)


class VisualNoise(NamedTuple):
    """Noise on the attention scores of one layer."""

    noise_BWP: Tensor
    """sigma * eps for each key of each row of a prompt, float32. 0 at keys that are not visual."""
    visual_BP: Tensor
    """Mask of the visual keys, bool."""
    by_lead: bool
    """True if the noise of a head and row is multiplied by the lead of its scores."""


@dataclass(frozen=True)
class AttentionNoise:
    """Noise of the responses to some prompts, by cell."""

    layers: tuple[int, ...]
    """0-based layers with noise."""
    values_NLC: Tensor
    """sigma * eps of each response, layer and cell, float32: of `layers` in their order, or of all of them at once,
    L = 1, where they share it. C is the largest number of cells of a prompt."""
    cells_BP: Tensor
    """Cell of each prompt token, int64; -1 where it is not visual. With several grids every visual token is a cell."""
    by_lead: bool = False
    """True if the noise of a head and row is multiplied by the lead of its scores."""

    @classmethod
    def draw(
        cls, prompts: PromptBatch, group_size: int, settings: ExplorationSettings, *identity: object
    ) -> "AttentionNoise":
        """Draw the noise of `group_size` responses to each prompt, in host memory.

        Args:
            prompts: B prompts.
            group_size: Number G of responses of each prompt; N = B G, prompt by prompt.
            settings: Noise.
            identity: Key of the random streams, such as seed and rollout.
        """
        layers, grids = tuple(sorted(settings.noisy_layers)), settings.grids
        cells = torch.full(prompts.input_ids.shape, -1)
        by_grid = [[visual_cells(prompt, grid) for grid in grids] for prompt in prompts.prompts]
        for b, own in enumerate(by_grid):
            cells[b, prompts.visual_mask[b]] = own[0] if len(grids) == 1 else torch.arange(len(own[0]))
        names = ("all layers",) if settings.is_shared else layers
        values = torch.zeros(len(prompts) * group_size, len(names), max(int(cells.max()) + 1, 1))
        for b, key in enumerate(prompts.identities):
            counts = [torch.bincount(own, minlength=1).double() for own in by_grid[b]]
            for g in range(group_size):
                count, own = counts[g % len(grids)], by_grid[b][g % len(grids)]
                for index, name in enumerate(names):
                    eps = normal_stream(len(count), "attention noise", *identity, key, g, name)
                    eps = eps - (eps * count).sum() / count.sum().clamp(min=1)
                    eps = eps if len(grids) == 1 else eps[own]
                    values[b * group_size + g, index, : len(eps)] = settings.sigma * eps
        return cls(layers, values, cells, settings.by_lead)

    def select(self, rows: Tensor, prompts: Optional[Tensor], length: int) -> "AttentionNoise":
        """Return the noise of some responses.

        Args:
            rows: Indices of responses.
            prompts: Indices of the prompts that are left. None: all.
            length: Number of prompt tokens that are left.
        """
        cells = self.cells_BP if prompts is None else self.cells_BP.index_select(0, prompts)
        return AttentionNoise(self.layers, self.values_NLC.index_select(0, rows), cells[:, :length], self.by_lead)

    def place_of(self, layer: int) -> Optional[int]:
        """Return where the noise of a layer stands in `values_NLC`. None: the layer has none."""
        if layer not in self.layers:
            return None
        return 0 if self.values_NLC.shape[1] == 1 else self.layers.index(layer)

    def on_keys(self, values_BWC: Tensor) -> VisualNoise:
        """Return the noise of every key.

        Args:
            values_BWC: Noise of a layer, arranged by prompt, with W responses of each.
        """
        visual = self.cells_BP >= 0
        index = self.cells_BP.clamp(min=0)[:, None].expand(-1, values_BWC.shape[1], -1)
        return VisualNoise(values_BWC.gather(2, index) * visual[:, None], visual, self.by_lead)


def move_inside_picture(scores_BKWMP: Tensor, noise: VisualNoise) -> Tensor:
    """Return attention weights exp(score), moved inside the picture by the noise.

    Args:
        scores_BKWMP: Scores minus the largest of their row, float32: of each prompt, key head, response, query head of
            the key head, and key. -inf at hidden keys.
        noise: Noise of the layer.

    Returns:
        Weights. Their sum over the picture is that without noise. Where the picture has no mass, it stays without any.
    """
    visual = noise.visual_BP[:, None, None, None]
    weights = scores_BKWMP.exp()
    before = torch.matmul(weights, noise.visual_BP[:, None, None, :, None].to(weights.dtype))
    shift = noise.noise_BWP[:, None, :, None]
    if noise.by_lead:
        count = visual.sum(dim=-1, keepdim=True)
        mean = torch.where(visual, scores_BKWMP, 0.0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
        top = torch.where(visual, scores_BKWMP, float("-inf")).amax(dim=-1, keepdim=True)
        shift = shift * torch.where(count > 0, top - mean, 0.0)
    moved = torch.where(visual, scores_BKWMP + shift, float("-inf"))
    top = moved.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(moved.dtype).min)
    moved = moved.sub_(top).exp_()
    after = moved.sum(dim=-1, keepdim=True)
    moved = moved.mul_(before / after.clamp(min=torch.finfo(after.dtype).tiny))
    return torch.where(visual, moved, weights)


def visual_cells(prompt: Prompt, grid: int) -> Tensor:
    """Return the cell of each visual token of a prompt, [visual tokens] int64, counted over all images and frames.

    Each image (or tile of one), and each temporal patch of a video, is divided into `grid` x `grid` cells, or into as
    many as it has visual tokens along a side if these are fewer.

    Args:
        prompt: Prompt.
        grid: Cells along each side. 0: every visual token is a cell.
    """
    if not len(prompt.grid_thw):
        return torch.zeros(0, dtype=torch.int64)
    patches, tokens = int(prompt.grid_thw.prod(dim=-1).sum()), int(prompt.visual_mask.sum())
    merge = math.isqrt(patches // tokens)
    parts, first = [], 0
    for frames, height, width in prompt.grid_thw.tolist():
        height, width = height // merge, width // merge
        tall, wide = (min(grid, side) if grid else side for side in (height, width))
        row, column = torch.arange(height) * tall // height, torch.arange(width) * wide // width
        one = row[:, None] * wide + column
        whole = torch.arange(frames)[:, None, None] * (tall * wide) + one
        parts.append(first + whole.flatten())
        first += frames * tall * wide
    return torch.cat(parts)

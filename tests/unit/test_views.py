"""Partial views: what each response sees, and that it is asked the same question about it."""

import dataclasses
from itertools import islice

import pytest
import torch

from megatron_ral.config.load import load_config
from megatron_ral.config.sections import ViewsConfig
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.errors import ConfigError
from megatron_ral.rollout import views
from megatron_ral.rollout.sampler import SampledBatch
from megatron_ral.rollout.views import sample_views, view_of, visible_tokens
from megatron_ral.types import Patches, Prompt, ResponseBatch, Sample, pad_prompts

CHANNELS, PER_CHANNEL = 3, 8
VIEWS = ViewsConfig(keep=0.4)


def prompt_of(key: str, grids: list[list[int]], before: int = 2, after: int = 3) -> Prompt:
    grid = torch.tensor(grids).reshape(-1, 3)
    patches = int(grid.prod(-1).sum())
    tokens = patches // 4
    length = before + tokens + after
    visual = torch.zeros(length, dtype=torch.bool)
    visual[before : before + tokens] = True
    generator = torch.Generator().manual_seed(len(key))
    levels = torch.arange(256.0).repeat(CHANNELS, 1) / 100 - torch.arange(3.0)[:, None]
    pixels = torch.randint(0, 256, (patches, 1, PER_CHANNEL // 2, CHANNELS), generator=generator, dtype=torch.uint8)
    parts = pixels.split(grid.prod(-1).tolist()) if grids else ()
    return Prompt(
        Sample(key, "a.tar", "?", "<answer>1</answer>", "", "", (), ()),
        torch.arange(length),
        torch.zeros(3, length, dtype=torch.int64),
        length,
        tuple(Patches(part, levels, 2) for part in parts),
        grid,
        torch.zeros(len(grid), dtype=torch.bool),
        torch.zeros(len(grid)),
        visual,
        torch.zeros(length, dtype=torch.bool),
        torch.zeros(0, dtype=torch.int64),
    )


PICTURE, TEXT = prompt_of("one", [[1, 8, 8], [2, 4, 4]]), prompt_of("text", [])


def test_views_belong_to_the_response_and_keep_the_wanted_share():
    seen = visible_tokens(PICTURE, 400, VIEWS, 0, 1)
    assert seen.shape == (400, 24)
    assert abs(seen.float().mean().item() - 0.4) < 0.03
    assert len({tuple(row.tolist()) for row in seen}) > 395
    assert torch.equal(seen[:8], visible_tokens(PICTURE, 8, VIEWS, 0, 1)), "independent of the size of the group"
    assert not torch.equal(seen[:8], visible_tokens(PICTURE, 8, VIEWS, 0, 2)), "other views in the next rollout"


def test_a_response_always_sees_something():
    seen = visible_tokens(PICTURE, 50, ViewsConfig(keep=1e-6), 0)
    assert (seen.sum(1) == 1).all()
    assert visible_tokens(TEXT, 4, VIEWS, 0).shape == (4, 0)


def test_cells_of_a_coarse_grid_are_kept_whole():
    seen = visible_tokens(PICTURE, 50, ViewsConfig(keep=0.5, grid=2), 0)
    first = seen[:, :16].view(50, 2, 2, 2, 2).transpose(2, 3).reshape(50, 4, 4)
    assert ((first.sum(-1) == 0) | (first.sum(-1) == 4)).all()


def test_hidden_tokens_show_the_median_colour_and_all_else_stays():
    seen = visible_tokens(PICTURE, 1, VIEWS, 3)[0]
    view = view_of(PICTURE, seen, 5)
    ours = view.pixel_values.view(24, 4, CHANNELS, PER_CHANNEL)
    theirs = PICTURE.pixel_values.view(24, 4, CHANNELS, PER_CHANNEL)
    for token in range(24):
        for channel in range(CHANNELS):
            if seen[token]:
                assert torch.equal(ours[token, :, channel], theirs[token, :, channel])
            else:
                values = sorted(theirs[:, :, channel].flatten().tolist())
                assert ours[token, :, channel].unique().tolist() == [values[(len(values) - 1) // 2]]
    assert view.sample.identity == "a.tar/one/view5"
    changed = {
        field.name
        for field in dataclasses.fields(Prompt)
        if getattr(view, field.name) is not getattr(PICTURE, field.name)
    }
    assert changed == {"sample", "patches"}
    assert view_of(TEXT, torch.zeros(0, dtype=torch.bool), 0).patches is TEXT.patches


class EchoSampler:
    """Answers a view with the numbers of the visual tokens that it shows."""

    def __init__(self):
        self.batches = []

    def sample(self, prompts, settings, batch_size, *identity):
        assert settings.group_size == 1
        remaining = iter(prompts)
        while part := list(islice(remaining, batch_size)):
            self.batches.append([prompt.sample.identity for prompt in part])
            ids, lengths = torch.zeros(len(part), 1, 30, dtype=torch.int64), []
            for row, prompt in zip(ids[:, 0], part):
                own = self.shown(prompt)
                row[: len(own)] = own
                lengths.append([len(own) + 1])
            logprobs = -torch.ones(ids.shape)
            batch = ResponseBatch(
                pad_prompts(part, 0), ids, torch.tensor(lengths), logprobs, torch.ones(len(part), 1) > 0
            )
            yield SampledBatch(batch, None, (0,) * len(part))

    @staticmethod
    def shown(prompt):
        tokens = int(prompt.visual_mask.sum())
        if not tokens:
            return torch.zeros(0, dtype=torch.int64)
        patches = prompt.pixel_values.view(tokens, 4, CHANNELS, PER_CHANNEL)
        return (patches != patches[:, :1, :, :1]).flatten(1).any(1).nonzero()[:, 0] + 1


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_groups_come_back_in_order_with_rows_over_what_they_saw(batch_size, monkeypatch):
    made = []
    monkeypatch.setattr(views, "view_of", lambda *arguments: made.append(1) or view_of(*arguments))
    sampler, prompts = EchoSampler(), [PICTURE, TEXT, prompt_of("another", [[1, 4, 4]])]
    sampling = SamplingSettings(5, 32, 3, 0)
    stream = sample_views(sampler, prompts, sampling, VIEWS, frozenset({2}), batch_size, 0, 1)
    groups = [next(stream)]
    assert len(made) == min(15, -(-5 // batch_size) * batch_size), "views are made as they are needed"
    groups += stream
    assert [len(batch) for batch in sampler.batches[:-1]] == [batch_size] * (len(sampler.batches) - 1)
    for prompt, group in zip(prompts, groups, strict=True):
        seen = visible_tokens(prompt, 5, VIEWS, 0, 1)
        P = len(prompt.input_ids)
        assert group.response_ids.shape == (5, 32) and group.attention[2].shape == (5, 32, P + 32)
        for g in range(5):
            shown = seen[g].nonzero()[:, 0]
            assert group.response_ids[g, : len(shown)].tolist() == (shown + 1).tolist()
            assert int(group.response_lengths[g]) == len(shown) + 1
            for row in group.attention[2][g]:
                assert torch.equal(row[:P][prompt.visual_mask] > 0, seen[g])
                assert row.sum() == pytest.approx(1.0 if len(shown) else 0.0)
                assert row[:P][~prompt.visual_mask].sum() == 0 and row[P:].sum() == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            ["rollout.attention_noise.sigma=4"],
            "rollout.views.keep = 0.3 is not possible with rollout.attention_noise.sig",
        ),
        (["loss.attention_target=explored"], "loss.attention_keys = all is not possible with rollout.views.keep = 0.3"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config("pretrained_configs/runs/ral_tiny.yaml", ["model.path=m", "rollout.views.keep=0.3", *settings])

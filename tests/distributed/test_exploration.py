"""Exploration while sampling: decoding under noise equals a slow pass under the same noise, in every layout.

The slow pass reads one prompt and one response at a time, in float64 where attention is formed: the noise is drawn
per visual token or per cell, multiplied by the lead of the head and row, added to the scores, and the mass on the
picture is put back head by head and row by row.
"""

import itertools
import zlib
from dataclasses import replace

import pytest
import torch

from megatron_ral.attention.exploration import ExplorationSettings
from megatron_ral.attention.group_layout import GroupLayout
from megatron_ral.config.sections import AttentionNoiseConfig, ViewsConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import PromptResponses, generate, sample_responses
from megatron_ral.functional.sampling import normal_stream
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.models.instrumented_attention import InstrumentedAttention
from megatron_ral.parallel.collectives import gather_objects
from megatron_ral.parallel.process_groups import stop_groups
from megatron_ral.rewards import score
from megatron_ral.rollout.native_sampler import NativeSampler
from megatron_ral.rollout.settings import RolloutSettings
from megatron_ral.training.step import Engines, StepSettings, rl_step
from megatron_ral.types import GroupBatch, pad_prompts
from tests.distributed.cases import fixed_groups, full_weights, open_policy
from tests.distributed.runner import run_ranks
from tests.distributed.test_generation import read

G, R, LAYERS, SIGMA, IDENTITY = 3, 10, 4, 2.5, (5, 7)
MERGE = 2
"""Patches along each side of a visual token."""
EVERYWHERE = frozenset(range(LAYERS))
EXPLORATION = ExplorationSettings(SIGMA, frozenset({0, 2, 3}), (0,), by_lead=True, recorded_layers=EVERYWHERE)
GRIDS = replace(EXPLORATION, grids=(2, 3), is_shared=True)
"""Coarse cells of two sizes in each group, for all layers together, as in pretrained_configs/runs/ral_explored_*."""


def explored(policy, settings: ExplorationSettings) -> ExplorationSettings:
    """Noise in three of four layers and rows of all; where some have linear attention, in and of the others."""
    softmax = frozenset(policy.shape.softmax_layers)
    return settings if softmax == EVERYWHERE else replace(settings, noisy_layers=softmax, recorded_layers=softmax)


def cell_of_each_token(prompt, grid: int) -> torch.Tensor:
    """Return the cell of each visual token, one token after the other."""
    if not grid:
        return torch.arange(int(prompt.visual_mask.sum()))
    cells, first = [], 0
    for frames, height, width in prompt.grid_thw.tolist():
        height, width = height // MERGE, width // MERGE
        tall, wide = min(grid, height), min(grid, width)
        for frame, row, column in itertools.product(range(frames), range(height), range(width)):
            cells.append(first + (frame * tall + row * tall // height) * wide + column * wide // width)
        first += frames * tall * wide
    return torch.tensor(cells, dtype=torch.int64)


def sampling(exploration: ExplorationSettings, end: int = 3) -> SamplingSettings:
    return SamplingSettings(G, R, end, 0, 1.0, 1.0, 12, exploration)


class SlowNoise:
    """Takes the place of `InstrumentedAttention._groups`: one prompt whose last token is the first of its response."""

    def __init__(self, prompt, response: int, settings: ExplorationSettings):
        visual = prompt.visual_mask.nonzero()[:, 0]
        self.length, self.visual, self.noise, self.rows = len(prompt.input_ids) - 1, visual, {}, {}
        cells = cell_of_each_token(prompt, settings.grids[response % len(settings.grids)])
        for layer in settings.noisy_layers if len(visual) else ():
            key = prompt.sample.identity, response, "all layers" if settings.is_shared else layer
            eps = normal_stream(int(cells.max()) + 1, "attention noise", *IDENTITY, *key)[cells]
            self.noise[layer] = SIGMA * (eps - eps.mean())

    def __call__(self, attention, query, key, value, pass_):
        query, key, value = (tensor.double() for tensor in (query, key, value))
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = torch.einsum("ind,jnd->nij", query, key) * attention.softmax_scale
        places = torch.arange(len(query))
        scores = scores.masked_fill(places > places[:, None], float("-inf"))
        weights = scores.softmax(-1)
        noise = self.noise.get(attention.layer)
        if noise is not None:
            picture = weights[:, self.length :, self.visual]  # the prompt but for its last token has no noise
            own = scores[:, self.length :, self.visual]
            moved = picture * (noise * (own.amax(-1, keepdim=True) - own.mean(-1, keepdim=True))).exp()
            moved = moved * picture.sum(-1, keepdim=True) / moved.sum(-1, keepdim=True)
            weights[:, self.length :, self.visual] = moved
        self.rows[attention.layer] = weights[:, self.length :].mean(0)
        return torch.einsum("nij,jnd->ind", weights, value).to(torch.float32)


def slow(policy, prompt, response: int, ids: torch.Tensor, settings: ExplorationSettings) -> tuple[dict, torch.Tensor]:
    """Return the rows by layer [R, P + R] and the log-probabilities [R] of one response under its noise."""
    batch = pad_prompts([prompt], 0)
    groups = GroupBatch(batch, ids[None, None], torch.tensor([[len(ids)]]), policy.encode_visual(batch))
    noise = SlowNoise(prompt, response, explored(policy, settings))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(InstrumentedAttention, "_groups", lambda self, *arguments: noise(self, *arguments))
        logits = policy.stage(groups, AttentionPass(GroupLayout.of(groups))).float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    return {layer: rows[:-1] for layer, rows in noise.rows.items()}, logprobs  # the last token predicts nothing


def expected(path: str, settings: ExplorationSettings = EXPLORATION):
    """Draw responses by one process's decoding and read each of them slowly."""
    policy, prompts = open_policy(path, 1, 1)[3], read(path)
    with policy.resident():
        batch = pad_prompts(prompts, 0)
        drawn = PromptResponses.split(
            generate(policy, batch, policy.encode_visual(batch), sampling(explored(policy, settings)), *IDENTITY)
        )
        found = [
            [slow(policy, prompt, g, rows.response_ids[g, : int(rows.response_lengths[g])], settings) for g in range(G)]
            for prompt, rows in zip(prompts, drawn)
        ]
        without = PromptResponses.split(
            generate(policy, batch, policy.encode_visual(batch), sampling(ExplorationSettings()), *IDENTITY)
        )
        recorded = PromptResponses.split(
            generate(
                policy,
                batch,
                policy.encode_visual(batch),
                sampling(ExplorationSettings(recorded_layers=explored(policy, settings).recorded_layers)),
                *IDENTITY,
            )
        )
    stop_groups()
    return drawn, found, without, recorded, [len(prompt.input_ids) for prompt in prompts]


@pytest.fixture(scope="module")
def wanted(material):
    return run_ranks(1, expected, str(material["tiny"]))[0]


def decoded(
    path: str, tensor: int, pipeline: int, batch_size: int, settings: ExplorationSettings = EXPLORATION
) -> list[PromptResponses]:
    policy, prompts = open_policy(path, tensor, pipeline)[3], read(path)
    layout, rows = policy.layout, []
    share = -(-len(prompts) // layout.data_size)
    mine = prompts[layout.data_rank * share : (layout.data_rank + 1) * share]
    with policy.resident():
        for batch, _ in sample_responses(policy, mine, sampling(explored(policy, settings)), batch_size, *IDENTITY):
            rows += PromptResponses.split(batch)
    stages = gather_objects([row.attention for row in rows], policy.process_groups.pipeline)
    rows = [
        replace(row, attention={layer: rows for stage in stages for layer, rows in stage[index].items()})
        for index, row in enumerate(rows)
    ]
    everything = [row for part in gather_objects(rows, policy.process_groups.data) for row in part]
    stop_groups()
    return everything


def check(ours: list[PromptResponses], wanted) -> None:
    drawn, found, _, _, lengths = wanted
    for row, reference, slow_rows, P in zip(ours, drawn, found, lengths, strict=True):
        assert set(row.attention) == set(slow_rows[0][0])
        for g, (attention, logprobs) in enumerate(slow_rows):
            count = int(reference.response_lengths[g])
            assert int(row.response_lengths[g]) == count
            assert (row.response_ids[g, :count] == reference.response_ids[g, :count]).all()
            assert (row.rollout_logprobs[g, :count] - logprobs).abs().max() < 1e-5
            for layer in attention:
                own = row.attention[layer][g, :count]
                own = torch.cat([own[:, :P], own[:, P : P + count - 1]], dim=1)
                assert (own - attention[layer][:, : P + count - 1]).abs().max() < 1e-5, (layer, g)


def test_rows_and_logprobs_are_those_of_the_slow_pass(wanted):
    drawn, _, without, _, _ = wanted
    check(drawn, wanted)
    lengths = torch.stack([row.response_lengths for row in drawn])
    assert len(lengths.unique()) > 3 and (lengths < R).any(), "rows leave the cache at different steps"
    assert any(
        (a.response_ids != b.response_ids).any()
        for a, b in zip(drawn, without)
        if a.response_ids.shape == b.response_ids.shape
    )


def test_recording_changes_no_response(wanted):
    _, _, without, recorded, _ = wanted
    for row, plain in zip(recorded, without):
        assert (row.response_ids == plain.response_ids).all() and not plain.attention
        assert (row.rollout_logprobs - plain.rollout_logprobs).abs().max() < 1e-5


def test_responses_of_a_prompt_look_at_different_places(wanted):
    """Without noise the first rows of a prompt's responses are one row; with it they differ."""
    drawn, _, _, recorded, lengths = wanted
    for noisy, plain, P in zip(drawn, recorded, lengths):
        first = plain.attention[3][:, 0, :P]
        assert (first - first[:1]).abs().max() < 1e-6
        if P > 30:  # a prompt with a picture
            assert (noisy.attention[3][:, 0, :P] - noisy.attention[3][:1, 0, :P]).abs().max() > 1e-3


#          world, tensor, pipeline, batch size
LAYOUTS = {
    "by two": (1, 1, 1, 2),
    "TP=2": (2, 2, 1, 6),
    "PP=2": (2, 1, 2, 2),
    "TP=2 PP=2": (4, 2, 2, 3),
    "DP=2": (2, 1, 1, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_decodes_under_the_same_noise(material, wanted, layout):
    world, *rest = LAYOUTS[layout]
    for rank in run_ranks(world, decoded, str(material["tiny"]), *rest):
        check(rank, wanted)


def test_responses_with_cells_of_their_own_size_decode_as_the_slow_pass_reads(material):
    path = str(material["tiny"])
    wanted = run_ranks(1, expected, path, GRIDS)[0]
    check(wanted[0], wanted)
    for layout in ("by two", "TP=2 PP=2"):
        world, *rest = LAYOUTS[layout]
        for rank in run_ranks(world, decoded, path, *rest, GRIDS):
            check(rank, wanted)


def test_a_model_with_linear_attention_decodes_under_noise_as_the_slow_pass_reads(material):
    """The state of a prompt must not hold its last token, whose hidden states differ between the responses."""
    path = str(material["qwen3_5"])
    wanted = run_ranks(1, expected, path)[0]
    assert set(wanted[1][0][0][0]) == {1, 3}
    for layout in ("by two", "TP=2 PP=2"):
        world, *rest = LAYOUTS[layout]
        for rank in run_ranks(world, decoded, path, *rest):
            check(rank, wanted)


def half_are_right(completion: str, solution: str) -> float:
    """Stand in for the accuracy, which an untrained model never has."""
    return float(zlib.crc32(completion.encode()) % 2)


def first_update(path: str, data: str, tensor: int, pipeline: int, micro_batch_size: int, target: str) -> dict:
    """Metrics of a rollout with noise (`views`: from partial views) and its only update, and what the update
    changed."""
    has_views, target = target == "views", "contrast" if target == "views" else target
    keys = "all" if target == "old" else "visual"
    opened = open_policy(
        path, tensor, pipeline, attention_target=target, attention_keys=keys, attention_layers=(1, 2), kl_coef=0.0
    )
    config, _, _, policy, objective = opened
    noise = AttentionNoiseConfig(sigma=0.0 if has_views else 3.0)
    views = ViewsConfig(keep=0.3 if has_views else 1.0)
    config = replace(
        config,
        rollout=replace(config.rollout, num_minibatches=1, num_epochs=1, attention_noise=noise, views=views),
        train=replace(config.train, micro_batch_size=micro_batch_size),
    )
    before, rows = full_weights(policy), fixed_groups(path, data)
    share = len(rows) // policy.layout.data_size
    mine = rows[policy.layout.data_rank * share : (policy.layout.data_rank + 1) * share]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "accuracy_reward", half_are_right)
        report = rl_step(
            Engines(policy, NativeSampler(policy)),
            [row[0] for row in mine],
            PromptProcessor(path, 128),
            objective,
            RolloutSettings.from_config(config),
            StepSettings.from_config(config),
            0,
            measure_gradient_ratio=True,
        )
    weights = full_weights(policy)
    stop_groups()
    return {"metrics": report.metrics, "changes": {name: weights[name] - before[name] for name in weights}}


@pytest.fixture(scope="module")
def alone(material):
    """One update of one process by target, in one micro-batch."""
    places = str(material["tiny"]), str(material["data"])
    return {
        target: run_ranks(1, first_update, *places, 1, 1, 8, target)[0]
        for target in ("old", "explored", "contrast", "views")
    }


def test_explored_targets_have_a_signal_in_the_first_update_and_old_has_none(alone):
    ratio = {target: result["metrics"]["attention/grad_ratio"] for target, result in alone.items()}
    assert ratio["old"] == 0.0 and min(ratio[name] for name in ("explored", "contrast", "views")) > 1e-3, ratio
    assert alone["old"]["metrics"]["attention/divergence"] == 0.0 < alone["explored"]["metrics"]["attention/divergence"]
    assert all("sampling/logprob_difference" not in result["metrics"] for result in alone.values())


@pytest.mark.parametrize(
    "target, world, tensor, pipeline, micro_batch_size",
    [("contrast", 4, 2, 2, 2), ("explored", 2, 1, 2, 4), ("contrast", 2, 1, 1, 1), ("views", 4, 1, 2, 4)],
)
def test_an_update_on_explored_rows_depends_on_no_layout(
    material, alone, target, world, tensor, pipeline, micro_batch_size
):
    places, wanted = (str(material["tiny"]), str(material["data"])), alone[target]
    ours = run_ranks(world, first_update, *places, tensor, pipeline, micro_batch_size, target)[-1]
    for name in ("reward", "attention/divergence", "attention/grad_ratio", "grad_norm", "attention/target_mass"):
        assert ours["metrics"][name] == pytest.approx(wanted["metrics"][name], rel=1e-4), name
    for name, change in wanted["changes"].items():
        assert (ours["changes"][name] - change).norm() <= 2e-3 * change.norm() + 1e-9, name

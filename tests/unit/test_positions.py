"""Rotary positions and angles against stock transformers, for random mixes of text, images and videos."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_ral.functional.positions import multimodal_positions, rotary_angles, rotary_axes
from tests.conftest import run_tools


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    root, families = tmp_path_factory.mktemp("stock"), ("qwen2_5_vl", "qwen3_vl")
    run_tools(*(("make_tiny_model.py", "--output", root / family, "--family", family) for family in families))
    models = {}
    for family in families:
        models[family] = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(root / family))
    return models


def random_mix(rng: random.Random) -> list[tuple[int, list[int]]]:
    """Return segments (type, grid): 0 text, 1 image, 2 video. Text stands between any two visuals."""
    mix = [(0, [rng.randint(1, 5)])]
    for _ in range(rng.randint(0, 4)):
        video = rng.random() < 0.5
        grid = [rng.randint(1, 9) if video else 1, 2 * rng.randint(1, 6), 2 * rng.randint(1, 6)]
        mix += [(2 if video else 1, grid), (0, [rng.randint(1, 5)])]
    return mix


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("seed", range(12))
def test_positions_equal_transformers(stock, family, seed):
    rng, model = random.Random(seed), stock[family].model
    mix = random_mix(rng)
    seconds = [rng.choice([0.3, 0.5, 1.0, 1.7, 4.0]) for kind, _ in mix if kind == 2]
    types, grids, intervals = [], [], []
    clock = iter(seconds)
    for kind, grid in mix:
        if kind == 0:
            types += [0] * grid[0]
            continue
        runs = [[1, *grid[1:]]] * grid[0] if kind == 2 and family == "qwen3_vl" else [grid]
        interval = float(2 * torch.tensor(next(clock))) if kind == 2 and family == "qwen2_5_vl" else 1.0
        for run in runs:
            types += [kind] * (run[0] * run[1] * run[2] // 4) + [0]  # an end token behind each run
            grids.append(run)
            intervals.append(interval)
    images, videos = ([grid for kind, grid in mix if kind == wanted] for wanted in (1, 2))
    inputs = {
        "image_grid_thw": torch.tensor(images) if images else None,
        "video_grid_thw": torch.tensor(videos) if videos else None,
    }
    if family == "qwen2_5_vl" and videos:
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    types = torch.tensor(types)
    wanted, _ = model.get_rope_index(torch.ones_like(types)[None], types[None], **inputs)
    ours, following = multimodal_positions(types > 0, torch.tensor(grids).reshape(-1, 3), 2, intervals)
    assert torch.equal(ours, wanted[:, 0])
    assert following == int(wanted[0, 0, -1]) + 1, "text goes on after the last text"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_rotary_angles_equal_transformers(stock, family):
    text = stock[family].config.text_config
    positions = torch.randint(0, 500, (3, 2, 37), generator=torch.Generator().manual_seed(0))
    rotary = stock[family].model.language_model.rotary_emb
    cos, sin = rotary(torch.zeros(1), positions)
    angles = rotary_angles(
        positions, rotary.inv_freq, rotary_axes(text.rope_parameters["mrope_section"], family == "qwen3_vl")
    )
    assert torch.equal(angles[:, :, 0].transpose(0, 1).cos(), cos)
    assert torch.equal(angles[:, :, 0].transpose(0, 1).sin(), sin)


@pytest.mark.parametrize(
    "tokens, grids, message",
    [
        ([1, 1, 0], [[1, 4, 4]], "image or video 0 needs 4 visual tokens in one run at position 0"),
        ([0, 1], [], "visual tokens at position 1 belong to no image or video"),
        ([0, 0], [[1, 2, 2]], "1 images or videos but visual tokens for 0"),
    ],
)
def test_tokens_that_do_not_fit_their_grids(tokens, grids, message):
    with pytest.raises(ValueError, match=message):
        multimodal_positions(torch.tensor(tokens) > 0, torch.tensor(grids, dtype=torch.int64).reshape(-1, 3), 2)

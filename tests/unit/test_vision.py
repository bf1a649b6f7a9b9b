"""Calls of the vision tower against transformers' own tower, in value and gradient; their number and size."""

import copy
from unittest.mock import Mock

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from megatron_ral.models import packed_attention, vision
from megatron_ral.models.families import FAMILIES
from megatron_ral.models.packed_attention import Segments, _buckets
from megatron_ral.models.vision import Frame, calls, encode_frames, frames_of, share
from megatron_ral.types import Patches

SIZES = {"depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 48}
CONFIGS = {
    "qwen2_5_vl": Qwen2_5_VLVisionConfig(**SIZES, window_size=112, fullatt_block_indexes=[1, 3]),
    "qwen3_vl": Qwen3VLVisionConfig(
        **SIZES, num_position_embeddings=64, deepstack_visual_indexes=[0, 2], patch_size=16
    ),
}
GRIDS = torch.tensor([[1, 6, 10], [2, 10, 10], [1, 14, 26], [1, 2, 2], [3, 4, 22], [1, 4, 22]])
"""Pictures and two videos: one window and many, windows cut at every edge, neighbours of one size."""
CPU = torch.device("cpu")


def towers(family: str, attention: str = "sdpa") -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our tower and transformers' own, with the same weights."""
    config = CONFIGS[family]
    torch.manual_seed(0)
    ours = FAMILIES[family].build_tower(config, torch.float32)
    stock = (
        FAMILIES[family]
        .tower_class()
        ._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention)
    )
    for parameter in ours.parameters():  # fresh biases are zero, and fresh attention is close to uniform
        parameter.data += 0.1 * torch.randn_like(parameter)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def pixels_of(family: str, grids: torch.Tensor = GRIDS) -> Patches:
    generator = torch.Generator().manual_seed(1)
    size = int(grids.prod(dim=1).sum()), 2, CONFIGS[family].patch_size ** 2, 3
    pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return Patches(pixels, torch.randn(3, 256, generator=generator))


def check_against_stock(family: str, attention: str = "sdpa") -> None:
    ours, stock = towers(family, attention)
    pixels = pixels_of(family)
    # Prompts hold any number of pictures, also none.
    per_prompt = [pixels[:60], pixels[60:60], pixels[60:624], pixels[624:]]
    features = encode_frames(ours, FAMILIES[family], frames_of(GRIDS), per_prompt)
    output = stock(pixels.values(), grid_thw=GRIDS)
    wanted = torch.stack([output.pooler_output, *getattr(output, "deepstack_features", ())], dim=1)
    assert features.shape == wanted.shape and (features - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    (features * weights).sum().backward()
    (wanted * weights).sum().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = theirs[name].grad
        apart = (parameter.grad - gradient).abs().max()
        # The bias of the keys has a gradient of rounding size only, beside those of queries and values.
        assert apart <= 1e-4 * gradient.abs().max(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("limit", [32_768, 300, 1], ids=["one_call", "some_calls", "a_call_per_frame"])
@pytest.mark.parametrize("family", CONFIGS)
def test_values_and_gradients_are_those_of_transformers(monkeypatch, family, limit, attention):
    monkeypatch.setattr(vision, "PATCHES_PER_CALL", limit)
    check_against_stock(family, attention)


def reference_varlen(query, key, value, bounds, key_bounds, longest, longest_key, *, scale):
    """What torch.nn.attention.varlen computes, segment by segment in float32 on the CPU."""
    assert bounds is key_bounds and bounds.dtype == torch.int32 and longest == longest_key == int(bounds.diff().max())
    assert query.dim() == 3 and all(part.stride(-1) == 1 for part in (query, key, value))
    parts = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        q, k, v = (part[start:stop].transpose(0, 1) for part in (query, key, value))
        parts.append(((q @ k.transpose(1, 2) * scale).softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_way_of_a_gpu_with_a_kernel_of_the_cpu(monkeypatch, family):
    """No GPU here: the kernel is replaced, everything around it is what CUDA runs."""
    kernel = Mock(side_effect=reference_varlen)
    monkeypatch.setattr(packed_attention, "varlen_attn", kernel)
    monkeypatch.setattr(vision, "uses_flash", lambda *arguments: True)
    check_against_stock(family)
    assert kernel.call_count == SIZES["depth"]


def test_flash_attention_is_for_16_bits_on_cuda(monkeypatch):
    capability = {"a100": (8, 0), "t4": (7, 5)}
    for card, expected in (("a100", True), ("t4", False)):
        monkeypatch.setattr(packed_attention, "_capability", lambda device, card=card: capability[card])
        assert packed_attention.uses_flash(torch.device("cuda"), torch.bfloat16, 80) is expected
    monkeypatch.setattr(packed_attention, "_capability", lambda device: (9, 0))
    assert not packed_attention.uses_flash(torch.device("cuda"), torch.float32, 80)
    assert not packed_attention.uses_flash(torch.device("cuda"), torch.bfloat16, 20)
    assert not packed_attention.uses_flash(CPU, torch.bfloat16, 80)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("grid", [[1, 92, 100], [1, 46, 200], [4, 50, 46]])
def test_a_picture_of_2300_tokens_takes_at_most_two_attention_calls_per_block(monkeypatch, family, grid):
    """transformers makes one per window (up to 156) and one per frame."""
    tower, seen = towers(family)[0], []

    def counted(query, key, value, **options):
        seen.append(query.shape)
        return value  # of the same shape as attention, which would take seconds here

    monkeypatch.setattr(packed_attention, "scaled_dot_product_attention", counted)
    grids = torch.tensor([grid])
    with torch.no_grad():
        encode_frames(tower, FAMILIES[family], frames_of(grids), [pixels_of(family, grids)])
    assert SIZES["depth"] <= len(seen) <= 2 * SIZES["depth"], seen
    blocks = {"qwen2_5_vl": 2, "qwen3_vl": 4}[family]  # attend over whole frames
    assert seen.count((grid[0], 4, grid[1] * grid[2], 16)) == blocks


def test_padding_adds_at_most_a_quarter_of_scores():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 150):
        lengths = torch.randint(1, 900, (count,), generator=generator).tolist()
        buckets = _buckets(lengths)
        assert sorted(index for bucket in buckets for index in bucket) == list(range(count))
        for bucket in buckets:
            widest = max(lengths[index] for index in bucket)
            assert len(bucket) * widest**2 <= 1.25 * sum(lengths[index] ** 2 for index in bucket)
        assert len(buckets) <= 20
    segments = Segments.of([64] * 40 + [32] * 9 + [16], CPU, flash=False)
    assert len(segments.buckets) == 1  # windows of one picture: edges are few beside its inside
    assert Segments.of([64] * 40, CPU, flash=False).places is None  # a batch as it is


def test_calls_hold_whole_frames_up_to_the_limit():
    frames = [Frame(2, 10), Frame(4, 10), Frame(20, 20), Frame(2, 2), Frame(4, 24)]
    assert list(calls(frames, 100)) == [frames[:2], [frames[2]], frames[3:]]
    assert list(calls(frames, 10_000)) == [frames]
    assert list(calls([], 100)) == []


def test_shares_are_consecutive_and_about_equal():
    frames = [Frame(4, 6 + 2 * (index % 5)) for index in range(60)]
    for parts in (1, 2, 3, 8):
        shares = share(frames, parts)
        assert len(shares) == parts and [frame for part in shares for frame in part] == frames
        sizes = [sum(frame.patches for frame in part) for part in shares]
        assert max(sizes) - min(sizes) <= 2 * max(frame.patches for frame in frames)
    assert share([Frame(4, 4)], 4) == [[], [], [Frame(4, 4)], []]
    assert share([], 2) == [[], []]
    assert share(frames_of(torch.tensor([[4, 2, 6]])), 2) == [[Frame(2, 6)] * 2] * 2  # a video is cut between frames


@pytest.mark.parametrize("family", CONFIGS)
def test_patches_are_projected_by_a_product(family):
    """Values and gradients are those of the convolution of transformers (see above), but none is called."""
    tower, stock = towers(family)
    names = []
    for each in (tower, stock):
        with torch.profiler.profile() as profile:
            each(pixels_of(family).values(), grid_thw=GRIDS)
        names.append({event.name for event in profile.events()})
    assert not any("conv" in name for name in names[0]) and any("conv3d" in name for name in names[1])


@pytest.mark.parametrize("family", CONFIGS)
def test_without_pictures_the_tower_has_zero_gradients(family):
    tower, _ = towers(family)
    features = encode_frames(tower, FAMILIES[family], [], [pixels_of(family)[:0]])
    assert features.shape == (0, 3 if family == "qwen3_vl" else 1, 48)
    features.sum().backward()
    assert all(not parameter.grad.any() for parameter in tower.parameters())

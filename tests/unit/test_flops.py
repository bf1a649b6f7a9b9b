"""FLOPs of a model's passes: published sizes by hand, and torch's own counter."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from megatron_ral.models.flops import group_flops, tower_flops_per_patch
from megatron_ral.models.shape import read_shape

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("name, parameters", [("qwen2.5-vl-7b", 7.07e9), ("qwen2.5-vl-72b", 71.46e9)])
def test_flops_of_published_sizes(name, parameters):
    """PaLM's 2 N per token with the matrices of all layers and the LM head, plus attention by hand."""
    shape = read_shape(str(PROJECT / "pretrained_configs" / "models" / name))
    P, R, G = 2048, 256, 8
    query = shape.num_attention_heads * shape.kv_channels
    attention = 4 * query * shape.num_layers * (P * (P + 1) / 2 + G * (R * P + R * (R + 1) / 2))
    head = 2 * shape.hidden_size * shape.vocab_size
    unread = 2 * 3 * shape.hidden_size * shape.ffn_hidden_size * (P - 1)
    linear = group_flops(shape, P, [R] * G) - attention - head * G * R + unread
    assert linear / (P + G * R) / 2 + head / 2 == pytest.approx(parameters, rel=0.01)
    # the group layout does the prompt once
    apart = G * group_flops(shape, P, [R])
    assert 3 < apart / group_flops(shape, P, [R] * G) < 6


def test_flops_against_a_counter(material):
    """Stock transformers under torch's own counter, corrected for all T x T pairs, all rows of the last MLP and of the
    LM head."""
    shape, T = read_shape(str(material["untied"])), 24
    model = AutoModelForImageTextToText.from_pretrained(material["untied"], attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(0, 300, (1, T)))
    query = shape.num_attention_heads * shape.kv_channels
    unread = 2 * 3 * shape.hidden_size * shape.ffn_hidden_size * (T - 1)  # by the last layer's MLP
    seen = group_flops(shape, T, []) + unread + 2 * shape.hidden_size * shape.vocab_size * T
    whole = seen + 4 * query * shape.num_layers * (T * T - T * (T + 1) / 2)
    rotary = counter.get_total_flops() - whole  # positions x frequencies as a small product
    assert 0 <= rotary < 0.002 * whole


@pytest.mark.parametrize("kind", ["tiny", "qwen3"])
def test_flops_of_the_tower_against_a_counter(material, kind):
    shape = read_shape(str(material[kind]))
    tower = AutoModelForImageTextToText.from_pretrained(material[kind], attn_implementation="eager").eval().model.visual
    patches = 16
    pixels = torch.randn(patches, 3 * shape.vision.temporal_patch_size * shape.vision.patch_size**2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(pixels, grid_thw=torch.tensor([[1, 4, 4]]))
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(count for operation, count in counts.items() if "bmm" not in str(operation))  # bmm: its attention
    assert tower_flops_per_patch(shape) * patches == pytest.approx(matrices, rel=1e-3)

"""Shapes that do not divide: kv heads fewer than tensor ranks, layers not divisible by stages, vocabulary not by ranks.

A step with every term of the loss is compared with one process; logits and attention rows after it with stock
transformers (which test_parity.py does for logits and gradients of every layout)."""

import json
import shutil

import pytest
import torch

from megatron_ral.parallel.rank_layout import RankLayout, stage_sizes
from tests.conftest import perturbed_copy
from tests.distributed.cases import one_step
from tests.distributed.runner import run_ranks
from tests.integration.test_runs import check_against_transformers, export_and_read


def odd_model(source, target, *, kv_heads: int, layers: int, vocab: int, seed: int):
    """A Qwen2.5-VL with odd numbers, its tokenizer and processor those of the tiny one."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    raw = json.loads((source / "config.json").read_text())
    raw["text_config"].update(
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=vocab,
        layer_types=["full_attention"] * layers,
        max_window_layers=layers,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(raw))
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def odd(material, tmp_path_factory):
    """1 kv head, 5 layers, 509 rows of vocabulary; and a second model of the same shape."""
    folder = tmp_path_factory.mktemp("odd")
    return [
        odd_model(material["tiny"], folder / f"odd{seed}", kv_heads=1, layers=5, vocab=509, seed=seed)
        for seed in (1, 2)
    ]


@pytest.mark.parametrize(
    "num_layers, stages, sizes",
    [(4, 2, [2, 2]), (5, 2, [3, 2]), (5, 3, [2, 2, 1]), (4, 3, [1, 2, 1]), (28, 8, [3, 4, 4, 4, 4, 3, 3, 3])],
)
def test_stage_sizes(num_layers, stages, sizes):
    assert stage_sizes(num_layers, stages) == sizes and sum(sizes) == num_layers
    covered = [
        layer for rank in range(stages) for layer in RankLayout(rank, stages, 1, stages).stage_layers(num_layers)
    ]
    assert covered == list(range(num_layers))
    layout = RankLayout(0, stages, 1, stages)
    for layer in range(num_layers):
        owner = layout.stage_of_layer(layer, num_layers)
        assert layer in layout.with_rank(owner).stage_layers(num_layers)


@pytest.mark.parametrize("world, tensor, pipeline", [(4, 4, 1), (3, 1, 3)])
def test_logits_and_attention_rows_of_an_exported_step_equal_transformers(
    material, odd, tmp_path, world, tensor, pipeline
):
    source, output = str(odd[0]), str(tmp_path / "hf")
    results = run_ranks(world, export_and_read, source, str(material["data"]), output, tensor, pipeline)
    check_against_transformers(results, source, output, str(material["data"]))


@pytest.mark.parametrize("family", ["qwen3", "internvl", "qwen3_5"])
def test_other_families_step_like_one_process(material, tmp_path, family):
    """Deep visual features, tiles, normalised heads, sequence parallelism and both kinds of parallel ranks at once."""
    other = perturbed_copy(material[family], tmp_path / "other", seed=9)
    arguments = (str(material[family]), str(other), str(material["data"]))
    alone = run_ranks(1, one_step, *arguments, 1, 1, 8, 1, (-1, 1))[0]
    result = run_ranks(8, one_step, *arguments, 2, 2, 2, 1, (-1, 1), True)[0]
    check_step(result, alone)


@pytest.mark.parametrize("world, tensor, pipeline", [(4, 4, 1), (3, 1, 3), (8, 2, 2)])
def test_odd_shapes_step_like_one_process(material, odd, world, tensor, pipeline):
    arguments = (str(odd[0]), str(odd[1]), str(material["data"]))
    alone = run_ranks(1, one_step, *arguments, 1, 1, 8, 1, (-1, 1))[0]
    check_step(run_ranks(world, one_step, *arguments, tensor, pipeline, 2, 1, (-1, 1))[0], alone)


def check_step(result, alone):
    for name, wanted in alone["history"][0].items():
        assert abs(result["history"][0][name] - wanted) <= 1e-5 * max(abs(wanted), 1e-7), name
    for name, wanted in alone["changes"].items():
        assert (result["changes"][name] - wanted).norm() <= 1e-3 * wanted.norm(), name

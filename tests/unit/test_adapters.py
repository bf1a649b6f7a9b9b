"""Low-rank adapters without processes: settings, wrong folders, first values, and bytes by arithmetic."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ral.commands.train import _check_models
from megatron_ral.config import load_config
from megatron_ral.config.rules import setting_warnings
from megatron_ral.errors import ConfigError
from megatron_ral.models.adapters import AdapterShape, merge_adapter
from megatron_ral.models.parameter_shapes import adapter_shapes, expected_shapes
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.planning.memory import policy_bytes
from megatron_ral.weights.peft_folder import check_adapters, fill_folder, new_factor, read_adapters
from megatron_ral.weights.resharding import held_parameters

RUN = "pretrained_configs/runs/ral_tiny.yaml"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(path, rank: int = 3, alpha: float = 6.0, targets: tuple[str, ...] = ALL):
    return dataclasses.replace(read_shape(str(path)), adapter=AdapterShape(rank, alpha, targets))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["adapter.rank=8", "adapter.dropout=0.1"], "adapter.dropout = 0.1 is not possible"),
        (["adapter.rank=8", "adapter.targets=[]"], "adapter.targets = [] must name at least one of q_proj, k_proj"),
        (["adapter.rank=8", "adapter.targets=[q_proj,q_proj]"], "each only once"),
        (["adapter.rank=8", "adapter.targets=[lm_head]"], "adapter.targets"),
        (["adapter.rank=-1"], "adapter.rank"),
        (["adapter.rank=8", "adapter.alpha=0.0"], "adapter.alpha"),
        (["adapter.path=somewhere"], "adapter.rank = 0 means no adapters, but adapter.path = somewhere"),
        (["train.algorithm=sft", "model.train_vision=true", "adapter.rank=8"], "adapters of the language layers alone"),
    ],
)
def test_settings_that_are_refused(settings, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(RUN, ["model.path=m", *settings])
    assert sentence in str(error.value)


def test_settings_of_adapters_without_adapters_warn():
    config = load_config(RUN, ["model.path=m", "adapter.alpha=8.0"])
    assert any(warning.startswith("adapter.alpha = 8.0 has no effect") for warning in setting_warnings(config))


def test_the_reference_is_held_only_where_it_is_another_model():
    for settings, held in ([], True), (["adapter.rank=4"], False), (["adapter.rank=4", "model.reference_path=r"], True):
        config = load_config(RUN, ["model.path=m", *settings])
        assert config.needs_reference and config.holds_reference == held


@pytest.fixture
def folder(material, tmp_path):
    shape = adapted(material["tiny"])
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(size, generator=generator) for name, size in adapter_shapes(shape).items()}
    (tmp_path / "adapter").mkdir()
    fill_folder(tmp_path / "adapter", shape, "base", torch.float32, values.__getitem__)
    return tmp_path / "adapter"


def test_a_folder_is_read_as_it_was_written(material, folder):
    values, stored = (
        read_adapters(str(folder), adapted(material["tiny"])),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert len(values) == len(stored) == 2 * 7 * 4
    name = "layers.2.mlp.down_proj.lora_B.weight"
    assert torch.equal(values[f"model.{name}"], stored[f"base_model.model.model.language_model.{name}"])


def change_config(**values):
    def change(folder) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def change_weights(change_tensors):
    def change(folder) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change_tensors(tensors)
        save_file(tensors, path)

    return change


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG_FOLDERS = {
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "another kind": (change_config(peft_type="IA3"), "adapters of type 'IA3'; only LORA is known"),
    "dora": (change_config(use_dora=True), "has use_dora = True"),
    "rank-stabilised": (change_config(use_rslora=True), "has use_rslora = True"),
    "ranks by layer": (change_config(rank_pattern={"q_proj": 4}), "has rank_pattern = "),
    "biases": (change_config(bias="all"), "has bias = 'all'"),
    "whole modules": (change_config(modules_to_save=["lm_head"]), "has modules_to_save = ['lm_head']"),
    "another rank": (change_config(r=4), "has r = 4; set adapter.rank to that"),
    "another alpha": (change_config(lora_alpha=7), "has lora_alpha = 7; set adapter.alpha to that"),
    "a matrix less": (change_weights(lambda tensors: tensors.pop(FIRST)), f"has no '{FIRST}'"),
    "the vision tower": (
        change_weights(
            lambda tensors: tensors.update(
                {"base_model.model.model.visual.blocks.0.mlp.gate_proj.lora_A.weight": torch.zeros(3, 4)}
            )
        ),
        "this project does not adapt",
    ),
    "another width": (
        change_weights(lambda tensors: tensors.update({FIRST: torch.zeros(3, 7)})),
        "of shape (3, 7)",
    ),
    "cut short": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-8]
        ),
        "is not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_wrong_folders_are_refused_before_anything_is_built(material, folder, case):
    change, sentence = WRONG_FOLDERS[case]
    change(folder)
    with pytest.raises(ValueError) as error:
        check_adapters(str(folder), adapted(material["tiny"]))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_values_that_are_not_finite_are_refused(material, folder):
    change_weights(lambda tensors: tensors[FIRST].fill_(math.nan))(folder)
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_adapters(str(folder), adapted(material["tiny"]))


def test_the_first_layer_needs_adapted_queries_or_keys(material, tmp_path):
    overrides = [
        f"model.path='{material['tiny']}'",
        f"train.output_dir='{tmp_path}'",
        f"data.train.0.shards='{material['data']}/rl-*.tar'",
        f"data.eval_shards='{material['data']}/heldout-*.tar'",
        "adapter.rank=2",
        "adapter.targets=[v_proj,down_proj]",
    ]
    with pytest.raises(ConfigError, match="names the first layer, whose attention no adapter reaches"):
        _check_models(load_config(RUN, [*overrides, "loss.attention_layers=[0,2]"]))
    shape, _ = _check_models(load_config(RUN, [*overrides, "loss.attention_layers=[1]"]))
    assert shape.adapter == AdapterShape(2, 32.0, ("v_proj", "down_proj"))


def test_first_values():
    A, B = (new_factor(f"model.layers.0.self_attn.q_proj.lora_{factor}.weight", (64, 100), 3) for factor in "AB")
    assert not B.any() and A.abs().max() <= 0.1 and A.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert torch.equal(A, new_factor("model.layers.0.self_attn.q_proj.lora_A.weight", (64, 100), 3))
    for layer, seed in (1, 3), (0, 4):
        other = new_factor(f"model.layers.{layer}.self_attn.q_proj.lora_A.weight", (64, 100), seed)
        assert not torch.equal(A, other)


def test_merging_is_the_product_in_float64():
    generator = torch.Generator().manual_seed(1)
    W, A, B = (torch.randn(size, generator=generator) for size in ((5, 7), (2, 7), (5, 2)))
    wanted = W.double() + 1.5 * B.double() @ A.double()
    torch.testing.assert_close(merge_adapter(W, A, B, 1.5).double(), wanted, atol=1e-6, rtol=1e-6)
    rounded = merge_adapter(W.bfloat16(), A, B, 1.5)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), W.bfloat16().double() + (wanted - W.double()), atol=1e-2, rtol=1e-2)


def test_bytes_of_a_large_model_are_those_of_the_arithmetic():
    """Qwen2.5-VL-7B, rank 16: 40.4 million numbers are trained; with TP = 4 and DP = 2 each rank holds 16 bytes of its
    share, of which whole factors (A of column-parallel matrices, B of row-parallel ones) are on every tensor rank."""
    shape = adapted("pretrained_configs/models/qwen2.5-vl-7b", rank=16, alpha=32.0)
    H, F, K = 3584, 18944, 512
    per_layer = 16 * ((H + H) + 2 * (H + K) + (H + H) + 2 * (H + F) + (F + H))
    assert sum(math.prod(size) for size in adapter_shapes(shape).values()) == 28 * per_layer == 40_370_176
    on_rank = 16 * (3 * H + (H + 2 * K) // 4 + H // 4 + H + 2 * H + 2 * F // 4 + F // 4 + H)
    layout = RankLayout(0, 8, 4, 1)
    ours, base = policy_bytes(shape, layout, "bfloat16", False), read_shape(shape.path)
    whole = held_parameters(base, 4, 1)[0]
    frozen = sum(-(-part.numel // 2) for part in whole.values()) * 2
    assert ours.shard == frozen + (2 + 16) * 28 * on_rank // 2
    assert expected_shapes(shape) == expected_shapes(base)

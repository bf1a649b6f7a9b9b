"""Conversion tools on odd shapes: bit-identical round trips, damage is named, nothing half-visible, little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from megatron_ral.errors import CheckpointError, ConfigError
from megatron_ral.models.families import FAMILIES
from megatron_ral.models.parameter_shapes import expected_shapes, visual_shapes
from megatron_ral.models.shape import read_shape
from megatron_ral.weights.conversion import differing_weights, to_hf, to_megatron
from megatron_ral.weights.huggingface import HuggingFaceWeights
from megatron_ral.weights.megatron import MegatronWeights
from megatron_ral.weights.safetensors_files import SafetensorsFile, SafetensorsWriter
from megatron_ral.weights.tensor_table import stage_tensors

PROJECT = Path(__file__).parents[2]


def odd_folder(
    source: Path, target: Path, *, kv_heads: int, layers: int, vocab: int, tied: bool, dtype=torch.float32
) -> Path:
    """Random weights of an odd shape, written with our own writer."""
    raw = json.loads((source / "config.json").read_text())
    raw["text_config"].update(
        num_key_value_heads=kv_heads, num_hidden_layers=layers, vocab_size=vocab, tie_word_embeddings=tied
    )
    raw["text_config"].pop("layer_types", None)
    if "linear_num_key_heads" in raw["text_config"]:
        raw["text_config"].update(linear_num_key_heads=4, linear_num_value_heads=8)
    raw["tie_word_embeddings"] = tied
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (target / "config.json").write_text(json.dumps(raw))
    shape = read_shape(str(target))
    shapes = {shape.family.hub_name(name): size for name, size in expected_shapes(shape).items()}
    writer = SafetensorsWriter(target / "model.safetensors", [(name, dtype, size) for name, size in shapes.items()])
    generator = torch.Generator().manual_seed(layers)
    for name, shape in shapes.items():
        writer.add(name, torch.randn(shape, generator=generator).to(dtype))
    writer.close()
    return target


@pytest.mark.parametrize(
    "family, kv_heads, layers, vocab, tied, dtype",
    [
        ("tiny", 1, 5, 509, True, torch.float32),
        ("tiny", 2, 3, 511, False, torch.bfloat16),
        ("tiny", 4, 4, 512, False, torch.float32),
        ("qwen3", 1, 8, 509, True, torch.bfloat16),
        ("qwen3", 2, 7, 510, False, torch.float32),
        ("internvl", 1, 7, 509, True, torch.bfloat16),
        ("internvl", 4, 4, 511, False, torch.float32),
        ("qwen3_5", 1, 7, 509, True, torch.bfloat16),
        ("qwen3_5", 2, 8, 511, False, torch.float32),
    ],
)
def test_round_trip_over_layouts_is_bit_identical(material, tmp_path, family, kv_heads, layers, vocab, tied, dtype):
    source = odd_folder(
        material[family], tmp_path / "hf", kv_heads=kv_heads, layers=layers, vocab=vocab, tied=tied, dtype=dtype
    )
    previous = source
    for number, (tensor, pipeline) in enumerate([(1, 1), (2, 3), (4, 1), (4, 2), (1, 3)]):
        to_megatron(previous, tmp_path / f"m{number}", tensor, pipeline)
        assert not differing_weights(source, tmp_path / f"m{number}")
        previous = tmp_path / f"m{number}"
    done = to_hf(previous, tmp_path / "back", max_shard_bytes=300_000)
    assert done.num_bytes == (source / "model.safetensors").stat().st_size - header_bytes(source / "model.safetensors")
    assert not differing_weights(source, tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 3
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()

    assert set(stored_names(tmp_path / "back")) == set(stored_names(source)), "names as on the hub"


def test_weights_of_two_precisions_keep_theirs(material, tmp_path):
    """Qwen3.5 on the hub: decays and norms of linear attention in float32, everything else in bfloat16."""
    shutil.copytree(material["qwen3_5"], tmp_path / "hf")
    file, wide = tmp_path / "hf" / "model.safetensors", ("A_log", "linear_attn.norm.weight")
    stored = {name: tensor if name.endswith(wide) else tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    to_megatron(tmp_path / "hf", tmp_path / "m", 2, 2)
    to_hf(tmp_path / "m", tmp_path / "back")
    back = {
        name: tensor for path in (tmp_path / "back").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_a_head_that_predicts_further_tokens_is_left_out_of_qwen3_5_alone(material, tmp_path):
    for name in ("qwen3_5", "qwen3"):
        shutil.copytree(material[name], tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file({**load_file(file), "mtp.fc.weight": torch.ones(2, 2)}, file, metadata={"format": "pt"})
    assert not differing_weights(material["qwen3_5"], tmp_path / "qwen3_5")
    to_megatron(tmp_path / "qwen3_5", tmp_path / "m", 1, 1)
    with pytest.raises(CheckpointError, match="mtp"):
        to_megatron(tmp_path / "qwen3", tmp_path / "n", 1, 1)


def stored_names(folder: Path) -> list[str]:
    return [name for file in folder.glob("*.safetensors") for name in SafetensorsFile(file).shapes]


@pytest.mark.parametrize(
    "family, kv_heads, tensor", [("tiny", 2, 2), ("tiny", 1, 4), ("qwen3", 4, 4), ("internvl", 2, 4)]
)
def test_a_rank_reads_no_more_than_its_shard(material, tmp_path, family, kv_heads, tensor):
    source = odd_folder(material[family], tmp_path / "hf", kv_heads=kv_heads, layers=4, vocab=509, tied=False)
    shape, read = read_shape(str(source)), []

    class Counted(HuggingFaceWeights):
        def __getitem__(self, name):
            read.append(torch.Size(self.shape_of(name)).numel())
            return super().__getitem__(name)

        def part(self, name, dim, start, stop):
            part = super().part(name, dim, start, stop)
            read.append(part.numel())
            return part

    weights = Counted(source)
    for entry in stage_tensors(shape, range(4), True, True, tensor, list(visual_shapes(shape))):
        full = entry.merge([weights[name] for name in entry.sources])
        read.clear()
        for rank in range(tensor):
            shard = entry.read(weights, rank, tensor)
            assert torch.equal(shard, entry.cut(full, rank, tensor)), entry.name
            if "linear_qkv" not in entry.name or kv_heads >= tensor:
                assert sum(read) <= shard.numel(), entry.name
            read.clear()


def header_bytes(path: Path) -> int:
    with open(path, "rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


@pytest.mark.parametrize("kind", ["untied", "qwen3", "internvl", "qwen3_5"])
def test_result_loads_in_stock_transformers(material, tmp_path, kind):
    to_megatron(material[kind], tmp_path / "m", 2, 2)
    to_hf(tmp_path / "m", tmp_path / "hf", max_shard_bytes=1_000_000)
    ours, stock = (
        AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (tmp_path / "hf", material[kind])
    )
    assert set(ours) == set(stock) and all(torch.equal(ours[name], stock[name]) for name in stock)


def test_one_changed_bit_is_found(material, tmp_path):
    to_megatron(material["tiny"], tmp_path / "m", 2, 1)
    assert len(differing_weights(material["tiny_other"], tmp_path / "m")) == len(HuggingFaceWeights(material["tiny"]))
    file = tmp_path / "m" / "tp_01_pp_00.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert len(differing_weights(material["tiny"], tmp_path / "m")) == 1


def test_damage_is_named_and_leaves_nothing(material, tmp_path):
    def refused(match, source, error=CheckpointError, tensor=2, pipeline=1):
        with pytest.raises(error, match=match):
            to_megatron(source, tmp_path / "out", tensor, pipeline)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    cut = shutil.copytree(material["tiny"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    refused("not a whole safetensors file", cut)
    (cut / "model.safetensors").unlink()
    refused("has no file 'model.safetensors'", cut)
    (cut / "model.safetensors.index.json").write_text("{not json")
    refused("index.json' is not readable", cut)
    family = shutil.copytree(material["tiny"], tmp_path / "family")
    (family / "config.json").write_text('{"model_type": "qwen2"}')
    refused("'qwen2' model; known families", family, ConfigError)
    (family / "config.json").write_text('{"model_type": "qwen2_5_vl", "text_config": {"num_hidden_layers": "x"}}')
    refused("config.json is not readable", family, ConfigError)
    for change, named in (
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}, "layer_types"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0, "mrope_section": [4, 6, 6]}},
            "rope_type = 'linear'",
        ),
    ):
        config = json.loads((material["tiny"] / "config.json").read_text())
        config["text_config"].pop("layer_types", None)
        config["text_config"].update(change)
        (family / "config.json").write_text(json.dumps(config))
        refused(f"config.json has text_config.*{named}", family, ConfigError)
    wrong = shutil.copytree(material["tiny"], tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    config["text_config"].update(num_hidden_layers=5, intermediate_size=400, layer_types=["full_attention"] * 5)
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        to_megatron(wrong, tmp_path / "out", 2, 1)
    assert "missing     model.layers.4.self_attn.q_proj.weight" in str(error.value)
    assert "mis-shaped  model.layers.0.mlp.up_proj.weight" in str(error.value)
    refused("does not divide the 4 attention heads", material["tiny"], ConfigError, tensor=3)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        to_megatron(material["tiny"], tmp_path / "out", 1, 1)
    to_megatron(material["tiny"], tmp_path / "m", 2, 1)
    (tmp_path / "m" / "tp_01_pp_00.safetensors").unlink()
    with pytest.raises(CheckpointError, match="tp_01_pp_00.safetensors' is missing or cut short"):
        MegatronWeights(tmp_path / "m")


def test_interrupted_conversion_leaves_nothing_visible(material, tmp_path, monkeypatch):
    def stop(num_bytes):
        raise KeyboardInterrupt

    for convert in (
        lambda: to_megatron(material["tiny"], tmp_path / "out", 2, 2, stop),
        lambda: to_hf(material["tiny"], tmp_path / "out", progress=stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            convert()
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_command_line(material, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)],
            cwd=PROJECT,
            capture_output=True,
            text=True,
        )

    done = run(
        "to-megatron",
        "--hf",
        material["tiny"],
        "--output",
        tmp_path / "m",
        "--tensor-parallel",
        2,
        "--pipeline-parallel",
        3,
    )
    assert done.returncode == 0 and "bytes in" in done.stdout and "GB/s" in done.stdout, done.stderr
    proof = run("verify", "--hf", material["tiny"], "--megatron", tmp_path / "m")
    assert proof.returncode == 0, proof.stdout + proof.stderr
    assert "80 tensors, 0 differ" in proof.stdout
    for kind in ("text", "one image", "two images", "a video", "an image and a video"):
        assert f"logits on {kind}: largest difference" in proof.stdout
    other = run("verify", "--hf", material["tiny_other"], "--megatron", tmp_path / "m", "--skip-logits")
    assert other.returncode == 1 and "80 differ" in other.stdout
    wrong = run("to-hf", "--megatron", material["tiny"], "--output", tmp_path / "x")
    assert wrong.returncode == 2 and "is not a Megatron folder" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    "model_type, text",
    [
        ("qwen3_vl_moe", {}),
        ("qwen3_5_moe", {}),
        ("glm4v_moe", {}),
        ("qwen3_moe", {}),
        ("internvl", {"model_type": "qwen3_moe"}),
        ("qwen3_vl", {"num_experts": 8}),
    ],
)
def test_a_mixture_of_experts_is_refused_by_name_with_the_families_that_work(tmp_path, model_type, text):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "text_config": text}))
    with pytest.raises(ConfigError, match=f"'{model_type}' model with a mixture of experts") as error:
        read_shape(str(tmp_path))
    assert error.value.key == "model.path" and all(family in error.value.remedy for family in FAMILIES)


PUBLISHED = {
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "qwen3.5-0.8b": 852_985_920,
    "qwen3.5-2b": 2_213_241_664,
    "qwen3.5-4b": 4_539_265_536,
    "qwen3.5-9b": 9_409_813_744,
    "qwen3.5-27b": 27_356_728_560,
    "internvl3.5-1b": 1_060_897_792,
    "internvl3.5-2b": 2_348_347_392,
    "internvl3.5-4b": 4_732_489_216,
    "internvl3.5-8b": 8_528_318_464,
    "internvl3.5-14b": 15_119_523_840,
    "internvl3.5-38b": 38_390_405_504,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(size):
    shape = read_shape(str(PROJECT / "pretrained_configs" / "models" / size))
    total = sum(torch.Size(dimensions).numel() for dimensions in expected_shapes(shape).values())
    assert total == PUBLISHED[size]
    shape.check_layout(8 if size != "qwen2.5-vl-7b" else 4, 4)

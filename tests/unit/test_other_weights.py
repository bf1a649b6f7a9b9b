"""Weights of other people's folders: read where stock transformers has no doubt, else refused in one sentence."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ral.commands.convert import main as convert
from megatron_ral.errors import CheckpointError
from megatron_ral.models.shape import read_shape
from megatron_ral.weights import stage_weights
from megatron_ral.weights.huggingface import HuggingFaceWeights
from megatron_ral.weights.tensor_table import stage_tables

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def copy(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """A copy of a model folder; returns its weights by stored name."""
    shutil.copytree(source, target)
    return load_file(target / FILE)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int = 2) -> dict[str, str]:
    """Write the weights as shards with an index, and return its map."""
    (folder / FILE).unlink(missing_ok=True)
    names, weight_map = sorted(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save({name: tensors[name] for name in names[number::count]}, folder / file)
        weight_map |= dict.fromkeys(names[number::count], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def embedding(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))


def untouched(folder, tensors):
    pass


def same_head(folder, tensors):
    save({**tensors, "lm_head.weight": embedding(tensors).clone()}, folder / FILE)


def head_alone(folder, tensors):
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    head = tensors.pop(name)
    save({**tensors, "lm_head.weight": head}, folder / FILE)


def rotary_buffers(folder, tensors):
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(16) for layer in range(4)}
    buffers["model.language_model.rotary_emb.inv_freq"] = torch.ones(16, dtype=torch.float64)
    buffers["visual.rotary_pos_emb.inv_freq"] = torch.ones(8)
    save({**tensors, **buffers}, folder / FILE)


def shards(folder, tensors):
    save_shards(folder, tensors, 3)


def index_of_the_single_file(folder, tensors):
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, FILE)}))


def long_names(folder, tensors):
    def name(old):
        if old.startswith("visual."):
            return f"model.{old}"
        return old.replace("model.", "model.language_model.", 1) if "language_model" not in old else old

    save(
        {(old if old.startswith("model.visual.") else name(old)): value for old, value in tensors.items()},
        folder / FILE,
    )


READ = [untouched, same_head, head_alone, rotary_buffers, shards, index_of_the_single_file, long_names]


@pytest.mark.parametrize("kind", ["tiny", "qwen3"])
@pytest.mark.parametrize("change", READ, ids=lambda change: change.__name__)
def test_what_stock_reads_without_doubt_is_read_alike(material, tmp_path, kind, change, capsys):
    from transformers import AutoModelForImageTextToText

    change(tmp_path / "hf", copy(material[kind], tmp_path / "hf"))
    layout = ["--tensor-parallel", "2", "--pipeline-parallel", "2"]
    assert convert(["to-megatron", "--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/m", *layout]) == 0
    assert convert(["verify", "--hf", f"{tmp_path}/hf", "--megatron", f"{tmp_path}/m", "--skip-logits"]) == 0
    assert " 0 differ" in capsys.readouterr().out
    assert convert(["to-hf", "--megatron", f"{tmp_path}/m", "--output", f"{tmp_path}/back"]) == 0
    ours, stock, original = (
        AutoModelForImageTextToText.from_pretrained(path).state_dict()
        for path in (tmp_path / "back", tmp_path / "hf", material[kind])
    )
    assert all(torch.equal(ours[name], stock[name]) and torch.equal(ours[name], original[name]) for name in original)


def head_that_differs(folder, tensors):
    head = embedding(tensors).clone()
    head[-1, -1] += 1
    save({**tensors, "lm_head.weight": head}, folder / FILE)


def head_of_other_rows(folder, tensors):
    save({**tensors, "lm_head.weight": embedding(tensors)[:-1].clone()}, folder / FILE)


def single_file_beside_stale_shards(folder, tensors):
    save_shards(folder, {name: tensor + 1 for name, tensor in tensors.items()})
    save(tensors, folder / FILE)


def two_names_of_one_weight(folder, tensors):
    save(
        {**tensors, "model.norm.weight": torch.ones(128), "model.language_model.norm.weight": torch.ones(128)},
        folder / FILE,
    )


def one_weight_in_two_shards(folder, tensors):
    save_shards(folder, tensors)
    file = folder / "model-00002-of-00002.safetensors"
    first = load_file(folder / "model-00001-of-00002.safetensors")
    save({**load_file(file), **dict([next(iter(first.items()))])}, file)


def changed_map(folder, tensors, change):
    weight_map = save_shards(folder, tensors)
    change(weight_map)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def index_with_another_place(folder, tensors):
    def change(weight_map):
        weight_map[sorted(weight_map)[0]] = "model-00002-of-00002.safetensors"

    changed_map(folder, tensors, change)


def index_with_a_tensor_too_many(folder, tensors):
    changed_map(folder, tensors, lambda weight_map: weight_map.update(nowhere="model-00001-of-00002.safetensors"))


def index_with_a_missing_file(folder, tensors):
    save_shards(folder, tensors)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_of_numbers(folder, tensors):
    changed_map(folder, tensors, lambda weight_map: weight_map.update(nowhere=3))


def torn_shard(folder, tensors):
    save_shards(folder, tensors)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def shards_without_an_index(folder, tensors):
    save_shards(folder, tensors)
    (folder / INDEX).unlink()


def prefixed(prefix, only=""):
    def change(folder, tensors):
        save({(prefix + name if only in name else name): tensor for name, tensor in tensors.items()}, folder / FILE)

    change.__name__ = f"prefix_{prefix}"
    return change


def language_model_under_a_prefix(folder, tensors):
    save(
        {(name if "visual" in name else f"inner.{name}"): value for name, value in tensors.items()},
        folder / FILE,
    )


def inside(part, beside):
    def change(folder, tensors):
        save({name.replace(beside, beside + part): tensor for name, tensor in tensors.items()}, folder / FILE)

    change.__name__ = f"inside_{part}"
    return change


def changed_header(change):
    def changed(folder, tensors):
        content = (folder / FILE).read_bytes()
        stop = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:stop])
        change([item for name, item in sorted(header.items()) if "norm1" in name])
        text = json.dumps(header).encode()
        (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + content[stop:])

    return changed


@changed_header
def tensors_that_overlap(norms):
    norms[0]["data_offsets"] = norms[1]["data_offsets"]


@changed_header
def a_tensor_before_the_first(norms):
    norms[0]["data_offsets"] = [begin - 10**7 for begin in norms[0]["data_offsets"]]


def index_without_files(folder, tensors):
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))


def index_of_another_folder(folder, tensors):
    changed_map(folder, tensors, lambda weight_map: weight_map.update(nowhere="../other/model.safetensors"))


def renamed(name):
    def change(folder, tensors):
        (folder / FILE).rename(folder / name)

    change.__name__ = f"renamed_{name}"
    return change


def half_precision_of_8_bits(folder, tensors):
    save({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, folder / FILE)


def whole_numbers(folder, tensors):
    save({**tensors, "model.layers.0.mlp.down_proj.qweight": torch.ones(4, dtype=torch.int32)}, folder / FILE)


def quantized_by_config(folder, tensors):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def pickle_alone(folder, tensors):
    (folder / FILE).rename(folder / "pytorch_model.bin")


def adapter_alone(folder, tensors):
    (folder / FILE).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def adapter_without_config(folder, tensors):
    adapter_alone(folder, tensors)
    (folder / "config.json").unlink()


def adapter_beside_the_model(folder, tensors):
    (folder / "adapter_config.json").write_text("{}")


def gguf(folder, tensors):
    (folder / FILE).rename(folder / "model-Q4_K_M.gguf")
    (folder / "config.json").unlink()


def checkpoint_of_a_run(folder, tensors):
    (folder / FILE).rename(folder / "rank_00000.safetensors")
    (folder / "config.json").unlink()


def lfs_pointer(folder, tensors):
    (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def no_weights(folder, tensors):
    (folder / FILE).unlink()


REFUSED = [
    (
        head_that_differs,
        "holds 'lm_head.weight' with other values than 'model.embed_tokens.weight' although config.json "
        "says tie_word_embeddings: true (stock transformers warns and uses both, other programs drop the head); set "
        "tie_word_embeddings to false there, in text_config too, to use the head, or remove it from the weights",
    ),
    (head_of_other_rows, "holds 'lm_head.weight' with other values than 'model.embed_tokens.weight'"),
    (
        single_file_beside_stale_shards,
        "holds weights twice: 'model.safetensors', which stock transformers would load, "
        "and 'model.safetensors.index.json' with the shards it names (model-00001-of-00002.safetensors, ..); "
        "remove the one that is not meant",
    ),
    (
        two_names_of_one_weight,
        "holds the weight 'model.norm.weight' twice, as 'model.language_model.norm.weight' in "
        "'model.safetensors' and 'model.norm.weight' in 'model.safetensors'; remove the one that is not meant",
    ),
    (
        one_weight_in_two_shards,
        "twice, as 'model.embed_tokens.weight' in 'model-00001-of-00002.safetensors' and "
        "'model.embed_tokens.weight' in 'model-00002-of-00002.safetensors'; remove the one that is not meant",
    ),
    (
        index_with_another_place,
        ": 'model.safetensors.index.json' names 'model-00002-of-00002.safetensors' for the tensor "
        "'model.embed_tokens.weight', that is in 'model-00001-of-00002.safetensors'; index and files are "
        "not of one export, copy the folder again",
    ),
    (
        index_with_a_tensor_too_many,
        "for the tensor 'nowhere', that no file holds; index and files are not of one export",
    ),
    (index_with_a_missing_file, "has no file 'model-00002-of-00002.safetensors'"),
    (index_of_numbers, "model.safetensors.index.json' is not a safetensors index"),
    (torn_shard, "model-00002-of-00002.safetensors' is not a whole safetensors file"),
    (
        shards_without_an_index,
        "has no file 'model.safetensors': 'model-00001-of-00002.safetensors' is one of several "
        "weight files, but model.safetensors.index.json is missing; copy it",
    ),
    (
        prefixed("module."),
        "has 80 of its 80 weights under the prefix 'module.' of a wrapper (first: "
        "'module.model.embed_tokens.weight'); save the model inside the wrapper (a merged one after "
        "merge_and_unload), or rename them without the prefix",
    ),
    (prefixed("base_model.model."), "has 80 of its 80 weights under the prefix 'base_model.model.' of a wrapper"),
    (prefixed("_orig_mod."), "has 80 of its 80 weights under the prefix '_orig_mod.' of a wrapper"),
    (prefixed("model.", "model."), "under the prefix 'model.' of a wrapper (first: 'model.model.embed_tokens.weight')"),
    (
        language_model_under_a_prefix,
        "has 50 of its 80 weights under the prefix 'inner.' of a wrapper (first: 'inner.model.embed_tokens.weight')",
    ),
    (
        inside("base_layer.", "q_proj."),
        "has 8 of its 80 weights with the part 'base_layer.' of a wrapper in it (first: "
        "'model.layers.0.self_attn.q_proj.base_layer.bias'); save the model inside the wrapper (a merged one after "
        "merge_and_unload), or rename them without the part",
    ),
    (inside("_orig_mod.", "layers."), "has 48 of its 80 weights with the part '_orig_mod.' of a wrapper in it"),
    (
        inside("_checkpoint_wrapped_module.", "layers.0."),
        "has 12 of its 80 weights with the part '_checkpoint_wrapped_",
    ),
    (prefixed("transformer."), "under the prefix 'transformer.' of a wrapper"),
    (tensors_that_overlap, "is not a whole safetensors file (ValueError('its tensors overlap or leave a gap'))"),
    (a_tensor_before_the_first, "is not a whole safetensors file (ValueError('its tensors overlap or leave a gap'))"),
    (index_without_files, "model.safetensors.index.json' is not a safetensors index"),
    (index_of_another_folder, "model.safetensors.index.json' is not a safetensors index"),
    (
        renamed("model.fp16.safetensors"),
        "has no file 'model.safetensors': 'model.fp16.safetensors' is there instead; where it holds the whole model, "
        "rename it to model.safetensors",
    ),
    (renamed("zero_to_fp32.py"), "'zero_to_fp32.py' is a part of a DeepSpeed checkpoint; let it write the weights, or"),
    (renamed("__0_0.distcp"), "'__0_0.distcp' is a part of a distributed checkpoint; write the model with"),
    (
        renamed("adapter_model.safetensors"),
        "'adapter_model.safetensors' is a PEFT adapter, not a whole model; merge it",
    ),
    (half_precision_of_8_bits, "has type F8_E4M3; known: F32, BF16, F16; give the folder of the unquantized model"),
    (whole_numbers, "tensor 'model.layers.0.mlp.down_proj.qweight' has type I32; known: F32, BF16, F16"),
    (
        quantized_by_config,
        "is quantized (config.json has a quantization_config, method 'awq'), and only floating-point "
        "weights of 16 or 32 bits can be trained; give the folder of the unquantized model",
    ),
    (
        pickle_alone,
        "has no file 'model.safetensors': 'pytorch_model.bin' is a pickle, which can run code and is never "
        "opened here; load it with transformers where you trust it, and write safetensors with save_pretrained",
    ),
    (adapter_alone, "it is a PEFT adapter ('adapter_config.json'), not a whole model; merge it into its base model"),
    (adapter_without_config, "is neither a Hugging Face nor a Megatron folder (no config.json): it is a PEFT adapter"),
    (adapter_beside_the_model, "where it is merged already, remove 'adapter_config.json'"),
    (
        gguf,
        "(no config.json): 'model-Q4_K_M.gguf' is a GGUF file, made for inference alone; give the safetensors folder "
        "that it was made from",
    ),
    (
        checkpoint_of_a_run,
        "(no config.json): 'rank_00000.safetensors' is the state of a run; write a model folder with "
        "tools/convert_checkpoint.py from-run",
    ),
    (lfs_pointer, "holds Git LFS pointers instead of files (model.safetensors); fetch them with git lfs pull"),
    (no_weights, "has no file 'model.safetensors'"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_not_clear_is_refused_in_one_sentence(material, tmp_path, change, message, capsys):
    change(tmp_path / "hf", copy(material["tiny"], tmp_path / "hf"))
    layout = ["--tensor-parallel", "1", "--pipeline-parallel", "1"]
    assert convert(["to-megatron", "--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/m", *layout]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line and f"{tmp_path}/hf" in line
    assert not (tmp_path / "m").exists()


def test_a_head_of_its_own_is_used_once_config_says_so(material, tmp_path):
    tensors = copy(material["tiny"], tmp_path / "hf")
    head_that_differs(tmp_path / "hf", tensors)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    weights = HuggingFaceWeights(tmp_path / "hf")
    assert weights["lm_head.weight"][-1, -1] == weights["model.embed_tokens.weight"][-1, -1] + 1


@pytest.mark.parametrize(
    "value, dtype, fault",
    [
        (float("nan"), torch.float32, "NaN or infinite values"),
        (float("-inf"), torch.float32, "NaN or infinite values"),
        (1e6, torch.float16, "values beyond torch.float16"),
    ],
)
def test_values_that_are_not_finite_are_refused_when_they_are_loaded(material, tmp_path, value, dtype, fault):
    tensors = copy(material["tiny"], tmp_path / "hf")
    tensors["model.norm.weight"][3] = value
    save(tensors, tmp_path / "hf" / FILE)
    shape = read_shape(str(tmp_path / "hf"))
    [table] = stage_tables(shape, 1, 1)
    weights = HuggingFaceWeights(tmp_path / "hf")
    parameters = {tensor.name: tensor.read(weights, 0, 1).to(dtype) for tensor in table}
    layout = SimpleNamespace(pipeline_rank=0, pipeline_size=1, tensor_rank=0, tensor_size=1)
    stage: Any = SimpleNamespace(shape=shape, layout=layout, dtype=dtype, named_parameters=parameters.items)
    with pytest.raises(CheckpointError, match=f"hf' has {fault} in 'model.norm.weight'; give an earlier checkpoint$"):
        stage_weights.load_stage(stage, str(tmp_path / "hf"))

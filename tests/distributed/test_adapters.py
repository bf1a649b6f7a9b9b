"""Low-rank adapters: every layout like one process, the base untouched, both exports as PEFT and transformers read it.

The adapters start from a folder that PEFT itself wrote, with random A and B, so that both have gradients at once."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from megatron_ral.engine.frozen import FrozenEngine, PolicyBase
from megatron_ral.engine.settings import EngineSettings
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.collectives import gather_from_all
from megatron_ral.parallel.process_groups import stop_groups
from megatron_ral.weights.adapter_weights import export_adapters
from megatron_ral.weights.stage_weights import export_stage
from tests.distributed.cases import fixed_groups, micro_batches, one_step, open_policy
from tests.distributed.runner import run_ranks
from tests.distributed.test_odd_shapes import odd_model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.({})"


def write_peft_folder(model: str, folder, rank: int, alpha: int, targets: tuple[str, ...]) -> dict:
    """Write random adapters of a model with PEFT. Return the settings of a run that starts from them."""
    torch.manual_seed(5)
    pattern = LANGUAGE.replace("{}", "|".join(targets))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights=False)
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    get_peft_model(base, config).save_pretrained(folder)
    return {"rank": rank, "alpha": float(alpha), "targets": targets, "path": str(folder)}


@pytest.fixture(scope="module")
def adapters(material, tmp_path_factory) -> dict:
    """Settings `adapter` by model."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write_peft_folder(str(material[name]), root / name, 3, 6, targets)
        for name, targets in (("tiny", ALL), ("qwen3", ALL), ("qwen3_5", ALL), ("untied", ("q_proj", "v_proj")))
    }


def check_step(results: list[dict], alone: dict) -> None:
    """Compare metrics, norms, gradients and weights of all ranks with those of one process."""
    for result in results:
        for step, wanted in enumerate(alone["history"]):
            for name, value in wanted.items():
                # The policy loss is a sum of terms of both signs that are about 1 each, and cancel to a hundredth.
                least = 1e-6 if name == "loss/policy" else 1e-9
                assert result["history"][step][name] == pytest.approx(value, rel=1e-5, abs=least), (step, name)
    largest = max(float(gradient.abs().max()) for gradient in alone["gradient"].values())
    for name, wanted in alone["gradient"].items():
        assert (results[0]["gradient"][name] - wanted).abs().max() <= 1e-5 * largest, name
        assert wanted.abs().max() > 0, f"{name} would be equal without being trained"
    for name, wanted in alone["weights"].items():
        assert (results[0]["weights"][name] - wanted).norm() <= 1e-5 * wanted.norm(), name
        if ".lora_" in name:
            change = alone["changes"][name]
            assert change.norm() > 0 and (results[0]["changes"][name] - change).norm() <= 1e-3 * change.norm(), name
        else:
            assert not alone["changes"][name].any() and not results[0]["changes"][name].any(), name


@pytest.mark.parametrize(
    "model, other, layout, sequence_parallel",
    [
        ("tiny", "tiny_other", (8, 2, 2), True),
        ("tiny", "tiny_other", (4, 2, 2), False),
        ("untied", "untied_other", (2, 2, 1), True),
        ("qwen3", "qwen3", (4, 2, 2), True),
        ("qwen3_5", "qwen3_5", (4, 2, 2), True),
    ],
)
def test_three_steps_like_one_process(material, adapters, model, other, layout, sequence_parallel):
    arguments = (str(material[model]), str(material[other]), str(material["data"]))
    world, tensor, pipeline = layout
    alone = run_ranks(1, steps, *arguments, 1, 1, 8, False, adapters[model])[0]
    assert set(alone["gradient"]) == {
        f"model.layers.{layer}.{'mlp' if part in ALL[4:] else 'self_attn'}.{part}.lora_{factor}.weight"
        for layer in range(4)
        for part in adapters[model]["targets"]
        if part in ALL[4:] or layer in read_shape(arguments[0]).softmax_layers
        for factor in "AB"
    }
    check_step(run_ranks(world, steps, *arguments, tensor, pipeline, 2, sequence_parallel, adapters[model]), alone)


def test_more_tensor_ranks_than_key_heads(material, tmp_path):
    """Rows of one key/value head on several ranks: the parts of a fused matrix are cut in the middle."""
    models = [
        str(odd_model(material["tiny"], tmp_path / f"odd{seed}", kv_heads=1, layers=3, vocab=509, seed=seed))
        for seed in (1, 2)
    ]
    settings = write_peft_folder(models[0], tmp_path / "adapter", 2, 8, ("k_proj", "q_proj", "up_proj"))
    arguments = (*models, str(material["data"]))
    alone = run_ranks(1, steps, *arguments, 1, 1, 8, False, settings)[0]
    check_step(run_ranks(4, steps, *arguments, 4, 1, 2, True, settings), alone)


def steps(path, other, data, tensor, pipeline, size, sequence_parallel, adapter) -> dict:
    parallel = {"recompute_activations": tensor > 1, "gather": "layer" if pipeline > 1 else "stage"}
    layers = (read_shape(path).softmax_layers[0], -1)
    return one_step(
        path, other, data, tensor, pipeline, size, 3, layers, sequence_parallel, adapter=adapter, parallel=parallel
    )


@pytest.mark.parametrize("model", ["tiny", "qwen3", "qwen3_5"])
def test_both_exports_and_the_base(material, adapters, tmp_path, model):
    """Ours with adapters on = our merged export = stock PEFT with our adapter folder; with adapters off = the base, bit
    for bit. Gradients and optimizer state are held for the adapters alone."""
    source, folder = str(material[model]), tmp_path
    ranks = run_ranks(8, export_both, source, str(material["data"]), str(folder), adapters[model])
    for _, held, stage in ranks:
        shards = {
            kind: sum(-(-numel // 2) for numel, trained in stage if trained or kind == "all")
            for kind in ("all", "trained")
        }
        assert held["parameters"] == 4 * shards["all"]
        assert held["gradients"] == held["master weights"] == 4 * shards["trained"]
        assert held["optimizer state"] - 8 * shards["trained"] in (0, 4)
        assert 0 < 20 * shards["trained"] < shards["all"]
    found = ranks[0][0]
    assert torch.equal(found["off"], found["base"]) and not torch.equal(found["on"], found["base"])
    assert torch.equal(found["on again"], found["on"])
    torch.testing.assert_close(found["merged"], found["on"], atol=1e-5, rtol=0)

    # the factors went through unchanged, and the merged weights are base + scale * B A
    read, written = (
        load_file(f"{place}/adapter_model.safetensors") for place in (adapters[model]["path"], f"{folder}/adapter")
    )
    assert read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in read)
    base, merged = (AutoModelForImageTextToText.from_pretrained(path).eval() for path in (source, f"{folder}/hf"))
    weights, changed = dict(base.named_parameters()), 0
    for name, ours in merged.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = weights[name]
        if f"{stem}.lora_A.weight" in read:
            wanted = wanted + 2.0 * read[f"{stem}.lora_B.weight"] @ read[f"{stem}.lora_A.weight"]
            changed += 1
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)
    assert changed == 4 * len(ALL[4:]) + len(read_shape(source).softmax_layers) * len(ALL[:4])

    ids = torch.arange(40).view(2, 20) + 5
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
        stock = [reader(input_ids=ids).logits for reader in (merged, adapted)]
    torch.testing.assert_close(stock[0], stock[1], atol=1e-5, rtol=0)


def export_both(path: str, data: str, folder: str, adapter: dict) -> tuple[dict, dict, list]:
    """Write both exports. Return the log-probabilities of fixed responses in every way, the bytes that this rank holds,
    and (numbers, trained) of its parameters."""
    opened = open_policy(path, 2, 2, adapter=adapter, sequence_parallel=True)
    _, process_groups, _, policy, _ = opened
    batches = [scored.groups for scored in micro_batches(fixed_groups(path, data, 4), 4, None)]

    def logprobs(engine) -> torch.Tensor:
        found = engine.forward(batches)
        return found[0].tokens.logprobs if found[0].tokens is not None else torch.zeros(0)

    result = {"on": logprobs(policy), "off": logprobs(PolicyBase(policy)), "on again": logprobs(policy)}
    with policy.resident():
        export_stage(policy.stage, process_groups, path, f"{folder}/hf")
        export_adapters(policy.stage, process_groups, path, f"{folder}/adapter")
    for name, where in (("base", path), ("merged", f"{folder}/hf")):
        result[name] = logprobs(FrozenEngine(read_shape(where), process_groups, EngineSettings(where, "float32", True)))
    every = gather_from_all(result)
    held = [(parameter.ds_numel, parameter.requires_grad) for parameter in policy.stage.parameters()]
    stop_groups()
    return every[-1], policy.shard_bytes(), held

"""Shards -> steps -> checkpoint -> resume = straight run; what TensorBoard holds; what an exported folder is."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from megatron_ral.functional.attention_policy import attention_policy
from megatron_ral.training.checkpoint import newest_checkpoint
from tests.distributed.cases import fixed_groups, micro_batches, open_policy
from tests.distributed.runner import run_ranks
from tests.integration.cases import RL, SFT, run_training, write_config


def exported(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted((folder / "hf").glob("*.safetensors"))
            for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("text, world, layout", [
    (RL, 2, []), (SFT, 2, []), (RL, 2, ["parallel.pipeline_model_parallel_size=2"]),
    (RL, 2, ["parallel.tensor_model_parallel_size=2"])], ids=["ral-dp2", "sft-dp2", "ral-pp2", "ral-tp2"])
def test_resumed_run_equals_straight_run_bit_for_bit(material, taught, tmp_path, text, world, layout):
    path, overrides = write_config(tmp_path, text, taught, material["data"], "rl" if text is RL else "search")
    overrides = overrides + layout
    run_ranks(world, run_training, path, overrides + [f"train.output_dir={tmp_path}/straight"])
    run_ranks(world, run_training, path, overrides + [f"train.output_dir={tmp_path}/cut", "train.stop_after_step=2"])
    assert not (tmp_path / "cut" / "hf").exists()
    # a half-written newer checkpoint must not be taken for whole
    (tmp_path / "cut" / "checkpoints" / "step_00000009").mkdir()
    assert newest_checkpoint(str(tmp_path / "cut")).name == "step_00000002"
    run_ranks(world, run_training, path, overrides + [f"train.output_dir={tmp_path}/cut"], True)
    straight, resumed = exported(tmp_path / "straight"), exported(tmp_path / "cut")
    assert set(straight) == set(resumed)
    moved = exported_difference(straight, taught)
    assert moved > 1e-3, "the run must have changed the weights for the comparison to mean something"
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


def exported_difference(tensors, source) -> float:
    from megatron_ral.models.weights import HuggingFaceWeights

    before = HuggingFaceWeights(str(source))
    return max(float((tensor - before[name]).abs().max()) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def finished(material, taught, tmp_path_factory):
    """A short RL run on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("finished")
    path, overrides = write_config(folder, RL, taught, material["data"], "rl")
    run_ranks(2, run_training, path, overrides + [f"train.output_dir={folder}/run"])
    return folder / "run"


def test_tensorboard_holds_what_a_user_looks_at(finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    wanted = {"reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy/mean", "rewards/format/mean",
              "rewards/unparsed/mean", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio",
              "clip_ratio/low", "clip_ratio/high", "grad_norm", "lr", "timing/rollout", "timing/update", "timing/step",
              "attention/divergence", "attention/grad_ratio", "attention/visual_mass", "attention/target_mass",
              "attention/sink_mass", "sampling/logprob_difference", "eval/accuracy", "eval/target_attention",
              "data/quarantined"}
    assert wanted <= set(tags["scalars"]), wanted - set(tags["scalars"])
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4]
    for tag in wanted:
        assert all(torch.isfinite(torch.tensor(event.value)) for event in events.Scalars(tag)), tag
    # on policy the first of the two updates of a rollout has no divergence, the second does
    assert all(event.value == 0 for event in events.Scalars("attention/divergence_first_update"))
    assert all(event.value > 0 for event in events.Scalars("attention/divergence_last_update"))
    ratios = [event.value for event in events.Scalars("attention/grad_ratio")]  # 0 where no group had a signal
    assert len(ratios) == 4 and min(ratios) >= 0 and max(ratios) > 0
    assert max(event.value for event in events.Scalars("sampling/logprob_difference")) < 1e-4
    assert {"attention/probe_0", "attention/probe_1"} <= set(tags["images"])
    picture = events.Images("attention/probe_0")[-1]
    assert (picture.width, picture.height) == (2 * 224 + 8, 224)
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    assert {"config", "completions/0", "completions/1", "probes/0"} <= texts


def test_run_leaves_summary_resolved_config_and_two_checkpoints(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["last_step"] == 4 and summary["layout"] == {"tensor": 1, "pipeline": 1, "data": 2}
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["latest", "step_00000003", "step_00000004"]
    manifest = json.loads((finished / "checkpoints" / "latest" / "manifest.json").read_text())
    assert {"config.yaml", "rank_00000.safetensors", "rank_00001.json"} <= set(manifest["files"])
    assert "attention_coef: 1.0" in (finished / "checkpoints" / "latest" / "config.yaml").read_text()


def export_and_read(path, data, output, tensor, pipeline):
    """Export from any layout, and our log-probs and attention rows of fixed groups."""
    from megatron_ral.models.weights import export_stage

    config, groups, shape, policy, _ = open_policy(path, tensor, pipeline)
    rollout = micro_batches(fixed_groups(path, data), 8, policy)
    [result] = policy.forward([rollout[0].groups], [1, 3])
    with policy.resident():
        export_stage(policy.stage, groups, path, output)
    from megatron_ral.parallel.groups import stop_groups

    stop_groups()
    attention = {layer: rows.attention for layer, rows in result.attention.items()}
    policies = {layer: rows.policy for layer, rows in result.attention.items()}
    return {"logprobs": result.tokens.logprobs if result.tokens else None, "attention": attention, "policy": policies}


@pytest.mark.parametrize("world, tensor, pipeline, kind", [
    (1, 1, 1, "tiny"), (2, 2, 1, "tiny"), (2, 1, 2, "tiny"), (4, 2, 2, "untied")])
def test_exported_folder_in_stock_transformers(material, tmp_path, world, tensor, pipeline, kind):
    """The outside reference: logits and eager attention of stock transformers on the exported folder."""
    source, output = str(material[kind]), str(tmp_path / "hf")
    results = run_ranks(world, export_and_read, source, str(material["data"]), output, tensor, pipeline)
    ours = {"logprobs": results[-1]["logprobs"],
            "policy": {layer: value for result in results for layer, value in result["policy"].items()},
            "attention": {layer: value for result in results for layer, value in result["attention"].items()}}
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(output, attn_implementation="eager").eval()
    AutoTokenizer.from_pretrained(output)
    groups = fixed_groups(source, str(material["data"]))
    P = max(len(prompt.input_ids) for prompt, *_ in groups)
    for b, (prompt, ids, lengths, _) in enumerate(groups):
        length = len(prompt.input_ids)
        for g in range(len(ids)):
            n = int(lengths[g])
            tokens = torch.cat([prompt.input_ids, ids[g, :n]])[None]
            with torch.no_grad():
                out = model(input_ids=tokens, mm_token_type_ids=(tokens == model.config.image_token_id).int(),
                            pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw,
                            output_attentions=True)
            wanted = torch.log_softmax(out.logits[0, length - 1:-1], -1).gather(-1, ids[g, :n, None])[:, 0]
            assert torch.allclose(ours["logprobs"][b, g, :n], wanted, atol=1e-4)
            for layer in (1, 3):
                eager = out.attentions[layer][0].mean(0)[length:]  # head average, response rows
                mine = ours["attention"][layer][b, g, :n]
                assert torch.allclose(torch.cat([mine[:, :length], mine[:, P:P + n]], -1), eager, atol=1e-5)
                own = torch.zeros_like(eager, dtype=torch.bool)
                own[torch.arange(n), length + torch.arange(n)] = True
                mine = ours["policy"][layer][b, g, :n]
                assert torch.allclose(torch.cat([mine[:, :length], mine[:, P:P + n]], -1),
                                      attention_policy(eager, own), atol=1e-5)
    # bit for bit what was loaded
    before = load_hub(source)
    after = load_hub(output)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def load_hub(folder) -> dict[str, torch.Tensor]:
    from megatron_ral.models.weights import HuggingFaceWeights

    weights = HuggingFaceWeights(folder)
    return {name: weights[name] for name in weights}

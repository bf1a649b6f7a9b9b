"""Shards -> steps -> checkpoint -> resume = straight run; what TensorBoard holds; what an exported folder is."""

import io
import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from transformers import AutoModelForImageTextToText, AutoTokenizer

from megatron_ral.attention.distribution import attention_distribution
from megatron_ral.attention.types import RowKeys
from megatron_ral.commands.convert import main as convert_checkpoint
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.models.shape import read_shape
from megatron_ral.training.checkpoint.files import newest_checkpoint
from megatron_ral.weights.conversion import differing_weights
from tests.distributed.cases import assemble, fixed_groups, micro_batches, open_policy
from tests.distributed.runner import run_ranks
from tests.integration.cases import RL, SFT, run_training, write_config


def exported(folder) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted((folder / "hf").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(
    "text, world, layout",
    [
        (RL, 2, []),
        (SFT, 2, []),
        (RL, 2, ["parallel.pipeline_model_parallel_size=2"]),
        (RL, 2, ["parallel.tensor_model_parallel_size=2"]),
        (RL, 2, ["loss.attention_target=reference"]),
        (RL, 2, ["rollout.refill_rounds=2"]),
        (RL, 2, ["rollout.overlap=true", "rollout.refill_rounds=2"]),
    ],
    ids=["ral-dp2", "sft-dp2", "ral-pp2", "ral-tp2", "ral-reference-dp2", "ral-refill-dp2", "ral-overlap-dp2"],
)
def test_resumed_run_equals_straight_run_bit_for_bit(material, trained_model, tmp_path, text, world, layout):
    path, overrides = write_config(tmp_path, text, trained_model, material["data"], "rl" if text is RL else "search")
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
    moved = exported_difference(straight, trained_model)
    assert moved > 1e-3, "the run must have changed the weights for the comparison to mean something"
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name
    check_written_from_a_checkpoint(tmp_path / "straight", tmp_path)


def check_written_from_a_checkpoint(run, folder) -> None:
    """What `convert_checkpoint.py from-run` makes of a run's last checkpoint is what the run exported."""
    step = newest_checkpoint(str(run))
    assert convert_checkpoint(["from-run", "--checkpoint", str(step), "--output", str(folder / "again")]) == 0
    assert differing_weights(folder / "again", run / "hf") == []
    assert {path.name for path in (folder / "again").glob("*.json")} >= {"config.json", "tokenizer.json"}


def test_any_step_is_written_as_a_folder_in_the_precision_of_the_run(material, trained_model, tmp_path, capsys):
    path, overrides = write_config(tmp_path, SFT, trained_model, material["data"])
    run_ranks(
        2,
        run_training,
        path,
        [
            *overrides,
            f"train.output_dir={tmp_path}/run",
            "train.num_steps=2",
            "model.dtype=bfloat16",
            "model.train_vision=false",
            "train.keep_checkpoints=2",
        ],
    )
    check_written_from_a_checkpoint(tmp_path / "run", tmp_path)
    first = str(tmp_path / "run/checkpoints/step_00000001")
    assert convert_checkpoint(["from-run", "--checkpoint", first, "--output", str(tmp_path / "first")]) == 0
    apart = differing_weights(tmp_path / "first", tmp_path / "again")
    assert apart and not any("visual" in name for name in apart), "language moved from step 1 to 2, the tower did not"
    capsys.readouterr()
    for arguments, said in (
        (["--checkpoint", str(tmp_path / "run")], "is no whole checkpoint of a run"),
        (["--checkpoint", first, "--model", str(tmp_path / "gone")], "--model = '"),
        (["--checkpoint", first, "--model", str(material["untied"])], "another model"),
    ):
        assert convert_checkpoint(["from-run", *arguments, "--output", str(tmp_path / "never")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "never").exists()


def test_resume_refuses_other_settings_and_used_folders(material, trained_model, tmp_path):
    from megatron_ral.config import load_config
    from megatron_ral.errors import CheckpointError
    from megatron_ral.training.checkpoint import restore
    from megatron_ral.training.checkpoint.settings import CheckpointSettings

    def find_checkpoint(config, resume):
        return restore.find_checkpoint(CheckpointSettings.from_config(config), resume)

    path, overrides = write_config(tmp_path, SFT, trained_model, material["data"])
    overrides = overrides + [f"train.output_dir={tmp_path}/run", "train.num_steps=1"]
    run_ranks(1, run_training, path, overrides)
    with pytest.raises(CheckpointError, match="holds 'step_00000001' of an earlier run"):
        find_checkpoint(load_config(path, overrides), resume=False)
    with pytest.raises(CheckpointError, match="optimizer.learning_rate = 0.5 but checkpoint"):
        find_checkpoint(load_config(path, overrides + ["optimizer.learning_rate=0.5"]), resume=True)
    assert find_checkpoint(load_config(path, overrides + ["logging.num_probes=1"]), resume=True) is not None
    free = [
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "train.micro_batch_size=1",
        "rollout.generation_batch_size=1",
        "train.async_checkpoint=false",
        "loss.attention_store=qk",
    ]
    assert find_checkpoint(load_config(path, overrides + free), resume=True) is not None


def test_one_rank_with_unusable_samples_goes_on_and_reports_them(trained_model, material, tmp_path):
    """Quarantine under two data-parallel ranks: only the second rank's shard is at fault."""
    from tests.unit.test_data import good, write_shard

    write_shard(tmp_path / "s-0.tar", [good(f"a{index}") for index in range(8)])
    write_shard(
        tmp_path / "s-1.tar",
        [good("b0")]
        + [good(f"bad{index}", target_boxes=[[0, 0, 999, 9]]) for index in range(3)]
        + [good(f"b{index}") for index in (1, 2, 3)],
    )
    path, overrides = write_config(tmp_path, SFT, trained_model, material["data"])
    run_ranks(
        2,
        run_training,
        path,
        overrides
        + [f"data.train=[{{shards: '{tmp_path}/s-*.tar'}}]", f"train.output_dir={tmp_path}/run", "train.num_steps=2"],
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sorted(summary["quarantined"]) == [f"s-1.tar/bad{index}" for index in range(3)]
    assert summary["last_step"] == 2


def exported_difference(tensors, source) -> float:
    from megatron_ral.weights.huggingface import HuggingFaceWeights

    before = HuggingFaceWeights(str(source))
    return max(float((tensor - before[name]).abs().max()) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def finished(material, trained_model, tmp_path_factory):
    """A short RL run on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("finished")
    path, overrides = write_config(folder, RL, trained_model, material["data"], "rl")
    run_ranks(2, run_training, path, overrides + [f"train.output_dir={folder}/run"])
    return folder / "run"


def test_run_with_other_losses_of_the_family(material, trained_model, tmp_path):
    """GSPO, Dr. GRPO's advantages, entropy bonus, groups filtered: steps are made and every number is finite."""
    path, overrides = write_config(tmp_path, RL, trained_model, material["data"], "rl")
    settings = {
        "policy_loss": "gspo",
        "aggregation": "sequence_mean",
        "advantage_scale": "none",
        "kl_estimator": "k2",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "entropy_coef": 0.01,
        "filter_equal_rewards": "true",
    }
    run_ranks(
        2,
        run_training,
        path,
        overrides
        + [f"loss.{key}={value}" for key, value in settings.items()]
        + [f"train.output_dir={tmp_path}/run", "logging.peak_tflops=0.5"],
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    flops, mfu = (
        [event.value for event in events.Scalars(f"throughput/{tag}")] for tag in ("model_tflops_per_rank", "mfu")
    )
    assert mfu == pytest.approx([value / 0.5 for value in flops]) and min(mfu) > 0
    for tag in ("loss/policy", "loss/token", "loss/attention", "kl", "ratio", "entropy", "grad_norm"):
        values = [event.value for event in events.Scalars(tag)]
        assert len(values) == 4 and all(torch.isfinite(torch.tensor(value)) for value in values), tag
    assert max(event.value for event in events.Scalars("frac_reward_zero_std")) > 0, "some group must be left out"
    assert exported_difference(exported(tmp_path / "run"), trained_model) > 1e-3


@pytest.mark.parametrize(
    "layout, settings",
    [
        ((1, 2), ["loss.policy_coef=1.0", "distill.token_divergence=jsd"]),
        ((1, 1), ["loss.policy_coef=0.0", "distill.teacher_rollouts=0.4", "distill.attention_layers=[0, -1]"]),
    ],
    ids=["with RL", "mixture"],
)
def test_run_with_a_teacher_in_another_layout(material, trained_model, tmp_path, layout, settings):
    """A larger teacher, cut over tensor ranks where the student is not: what a user looks at is there."""
    path, overrides = write_config(tmp_path, RL, trained_model, material["data"], "rl")
    run_ranks(
        2,
        run_training,
        path,
        overrides
        + settings
        + [
            f"train.output_dir={tmp_path}/run",
            "train.num_steps=2",
            "loss.attention_coef=0.0",
            f"teacher.path={material['teacher']}",
            "teacher.dtype=float32",
            "teacher.tensor_model_parallel_size=2",
            "teacher.pipeline_model_parallel_size=1",
            f"parallel.pipeline_model_parallel_size={layout[1]}",
        ],
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    for tag in (
        "distill/token_divergence",
        "distill/attention_divergence",
        "distill/agreement",
        "distill/teacher_target_mass",
        "distill/student_target_mass",
        "distill/attention_grad_ratio",
        "timing/teacher",
        "reward",
        "grad_norm",
    ):
        values = [event.value for event in events.Scalars(tag)]
        assert len(values) == 2 and all(torch.isfinite(torch.tensor(value)) for value in values), tag
    assert min(event.value for event in events.Scalars("distill/attention_divergence")) > 1e-4
    picture = events.Images("attention/probe_0")[-1]  # image, student, teacher
    assert (picture.width, picture.height) == (3 * 224 + 16, 224)
    own = [event.value for event in events.Scalars("distill/teacher_rollouts")]
    assert own == [0.0, 0.0] if layout[1] == 2 else 0 < sum(own) < 2
    # the sampler of the student's own responses is its training engine, whoever answered the others
    assert max(event.value for event in events.Scalars("sampling/logprob_difference")) < 1e-4
    assert exported_difference(exported(tmp_path / "run"), trained_model) > 1e-3


def test_tensorboard_holds_what_a_user_looks_at(finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    wanted = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/accuracy/mean",
        "rewards/format/mean",
        "rewards/unparsed/mean",
        "rewards/error/mean",
        "kl",
        "entropy",
        "completions/mean_length",
        "completions/clipped_ratio",
        "eval/unparsed_rate",
        "eval/error_rate",
        "clip_ratio/low",
        "clip_ratio/high",
        "grad_norm",
        "lr",
        "timing/rollout",
        "timing/update",
        "timing/step",
        "attention/divergence",
        "attention/grad_ratio",
        "attention/visual_mass",
        "attention/target_mass",
        "attention/sink_mass",
        "sampling/logprob_difference",
        "eval/accuracy",
        "eval/target_attention",
        "data/quarantined",
    }
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
    for tag in tags["images"]:
        for event in events.Images(tag):
            Image.open(io.BytesIO(event.encoded_image_string)).verify()
    assert [event.step for event in events.Images("attention/probe_0")] == [0, 2, 4], "a fixed cadence"
    table = events.Tensors("completions/0/text_summary")[-1].tensor_proto.string_val[0].decode().splitlines()
    assert table[2].startswith("| reward | unparsed | error | accuracy | format | response |") and len(table) == 4 + 3
    for row in table[4:]:
        reward, _, _, accuracy, form = map(float, row.split("|")[1:6])
        assert reward == pytest.approx(0.9 * accuracy + 0.1 * form, abs=0.006)


def test_tensorboard_says_how_fast_a_run_is(finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()

    def values(tag):
        return [event.value for event in events.Scalars(tag)]

    step, rollout, update = values("timing/step"), values("timing/rollout"), values("timing/update")
    shares = [tag for tag in events.Tags()["scalars"] if tag.startswith("timing/share/")]
    assert {"timing/share/data", "timing/share/rollout", "timing/share/update"} <= set(shares)
    assert [sum(share) for share in zip(*map(values, shares))] == pytest.approx([1.0] * 4, abs=1e-5)
    assert values("throughput/samples_per_second") == pytest.approx([24 / seconds for seconds in step], rel=1e-4)
    tokens = values("completions/tokens")
    for tag, phase in (("generated", rollout), ("trained", update)):
        assert values(f"throughput/{tag}_tokens_per_second") == pytest.approx(
            [count / seconds for count, seconds in zip(tokens, phase)], rel=1e-4
        )
    assert all(0.1 < value < 100 for value in values("memory/host_gib"))
    assert min(values("throughput/model_tflops_per_rank")) > 0
    assert "throughput/mfu" not in events.Tags()["scalars"], "the peak of a CPU is not known"


def test_runs_compare_by_settings_and_last_figures(finished):
    """What the plugins read: the layout names curves that exist, HPARAMS every setting and tags that exist."""
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [
        "reward",
        "attention",
        "policy",
        "throughput",
        "evaluation",
    ]
    empty = {
        chart.title
        for category in layout.category
        for chart in category.chart
        if not any(re.search(tag, scalar) for tag in chart.multiline.tag for scalar in scalars)
    }
    # without a known peak, without loss.sampler_correction, and without rollout.overlap
    assert empty == {
        "utilisation",
        "training engine / sampler",
        "ratios to the sampler above the cap",
        "updates since sampling",
    }
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["_method"].string_value == "ral" and settings["loss.attention_coef"].number_value == 1.0
    assert settings["rollout.group_size"].number_value == 3 and settings["data.train.0.shards"].string_value.endswith(
        "rl-*.tar"
    )
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    compared = {info.name.tag for info in plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos}
    assert compared == {tag for tag in scalars if tag.startswith("final/")} | {"final/loss"}, (
        "supervised runs have that"
    )
    rewards = [event.value for event in events.Scalars("reward")]
    assert events.Scalars("final/reward")[0].value == pytest.approx(sum(rewards) / 4)
    assert events.Scalars("final/eval/accuracy")[0].value == events.Scalars("eval/accuracy")[-1].value
    ended = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
    )
    assert ended.HasField("session_end_info")


def test_run_leaves_summary_resolved_config_and_two_checkpoints(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["last_step"] == 4 and summary["layout"] == {"tensor": 1, "pipeline": 1, "data": 2}
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["latest", "step_00000003", "step_00000004"]
    manifest = json.loads((finished / "checkpoints" / "latest" / "manifest.json").read_text())
    assert {"config.yaml", "rank_00000.safetensors", "rank_00001.json"} <= set(manifest["files"])
    assert "attention_coef: 1.0" in (finished / "checkpoints" / "latest" / "config.yaml").read_text()


def export_and_read(path, data, output, tensor, pipeline):
    """One optimizer step, then an export from any layout, and our logits and attention rows of fixed groups."""
    from megatron_ral.parallel.collectives import gather_shards
    from megatron_ral.parallel.process_groups import stop_groups
    from megatron_ral.weights.stage_weights import export_stage

    config, process_groups, _, policy, objective = open_policy(
        path, tensor, pipeline, attention_target="old", kl_coef=0.0
    )
    rollout = micro_batches(fixed_groups(path, data), 8, policy)
    old = policy.forward([rollout[0].groups], sorted(objective.recorded_layers))
    [minibatch] = assemble(rollout, old, None, old, objective, config, process_groups)
    policy.forward_backward(minibatch, objective)
    policy.step()
    seen = {}

    class Spy:
        """Keeps the logits that the last stage hands to its log-probabilities."""

        def __call__(self, logits, batch, layout, temperature):
            whole = torch.cat(gather_shards(logits, process_groups.tensor), dim=-1)
            seen["logits"] = layout.packed.responses.pad(whole)
            return type(policy).token_outputs(policy, logits, batch, layout, temperature)

    policy.token_outputs = Spy()
    [result] = policy.forward(
        [rollout[0].groups], [1, 3], store=lambda rows, batch: (rows.attention, rows.distribution())
    )
    with policy.resident():
        export_stage(policy.stage, process_groups, path, output)
    stop_groups()
    return {"logits": seen.get("logits"), "attention": result.attention}


@pytest.mark.parametrize(
    "world, tensor, pipeline, kind",
    [
        (1, 1, 1, "tiny"),
        (2, 2, 1, "tiny"),
        (2, 1, 2, "tiny"),
        (4, 2, 2, "untied"),
        (2, 2, 1, "qwen3"),
        (2, 2, 1, "internvl"),
        (2, 2, 1, "qwen3_5"),
    ],
)
def test_exported_folder_in_stock_transformers(material, tmp_path, world, tensor, pipeline, kind):
    """The outside reference: logits and eager attention of stock transformers on the exported folder."""
    source, output = str(material[kind]), str(tmp_path / "hf")
    results = run_ranks(world, export_and_read, source, str(material["data"]), output, tensor, pipeline)
    check_against_transformers(results, source, output, str(material["data"]))


def check_against_transformers(results, source, output, data):
    logits = results[-1]["logits"]
    rows = {layer: value for result in results for layer, value in result["attention"].items()}
    model = AutoModelForImageTextToText.from_pretrained(output, attn_implementation="eager").eval()
    AutoTokenizer.from_pretrained(output)
    groups, processor = fixed_groups(source, data), PromptProcessor(source, 128)
    P, softmax_layers = max(len(prompt.input_ids) for prompt, *_ in groups), read_shape(output).softmax_layers
    for b, (prompt, ids, lengths, _) in enumerate(groups):
        length = len(prompt.input_ids)
        for g in range(len(ids)):
            n = int(lengths[g])
            tokens = torch.cat([prompt.input_ids, ids[g, :n]])
            with torch.no_grad():
                out = model(**processor.stock_inputs(prompt, tokens), output_attentions=True)
            vocab = out.logits.shape[-1]  # ours may be padded
            assert torch.allclose(logits[b, g, :n, :vocab], out.logits[0, length - 1 : -1], atol=1e-4)
            for layer in (1, 3):
                recorded = out.attentions[softmax_layers.index(layer)]  # linear attention gives none
                eager = recorded[0].mean(0)[length:]  # head average, response rows
                keys = RowKeys(torch.ones(1, length + n, dtype=torch.bool), length + torch.arange(n)[None])
                for mine, wanted in zip(rows[layer], (eager, attention_distribution(eager[None, None], keys)[0][0, 0])):
                    mine = mine[b, g, :n]
                    assert torch.allclose(torch.cat([mine[:, :length], mine[:, P : P + n]], -1), wanted, atol=1e-5)
    before, after = load_hub(source), load_hub(output)
    assert set(before) == set(after)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved and all(not name.startswith("visual.") for name in moved), "the frozen tower comes back bit for bit"


def load_hub(folder) -> dict[str, torch.Tensor]:
    from megatron_ral.weights.huggingface import HuggingFaceWeights

    weights = HuggingFaceWeights(folder)
    return {name: weights[name] for name in weights}

"""Wrong input at the command line: one clear sentence on stderr, exit status 2, before any training."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.launch import run_command
from tests.integration.cases import RL, write_config

PROJECT = Path(__file__).resolve().parents[2]


def command(module: str, *arguments: str, world: int = 1) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    if world > 1:  # what torchrun sets; every error here comes before ranks talk to each other
        environment.update(RANK="0", WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    return run_command(module, *arguments, environment=environment)


@pytest.fixture(scope="module")
def good(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    path, overrides = write_config(folder, RL, material["tiny"], material["data"], "rl")
    return ["--config", path, *overrides, f"train.output_dir={folder}/run"], folder


def one_sentence(result: subprocess.CompletedProcess, *named: str) -> None:
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    for part in named:
        assert part in errors[0], errors[0]


@pytest.mark.parametrize(
    "world, override, named",
    [
        (1, "loss.atention_coef=1", ["run.yaml", "loss.atention_coef", "loss.attention_coef"]),
        (3, "parallel.tensor_model_parallel_size=3", ["parallel.tensor_model_parallel_size", "3", "4 attention heads"]),
        (8, "parallel.pipeline_model_parallel_size=8", ["parallel.pipeline_model_parallel_size", "8", "4 layers"]),
        (3, "parallel.tensor_model_parallel_size=2", ["tensor_model_parallel_size", "world size 3"]),
        (1, "data.train=[{shards: 'nowhere/*.tar'}]", ["data.train", "nowhere/*.tar", "matches no file"]),
        (1, "data.eval_shards=pipe:ls", ["data.eval_shards", "pipe:"]),
        (1, "model.path=nowhere", ["model.path", "nowhere", "config.json"]),
        (1, "loss.attention_layers=[9]", ["loss.attention_layers", "9", "4 layers"]),
        (1, "reward.functions.mine={path: 'nowhere:f', weight: 1.0}", ["reward.functions.mine.path", "nowhere:f"]),
        (1, "loss.attention_layers=[-1, 3]", ["loss.attention_layers", "twice"]),
    ],
)
def test_train_refuses(good, world, override, named):
    arguments, folder = good
    output = f"train.output_dir={folder}/never"
    one_sentence(command("megatron_ral.train", *arguments, output, override, world=world), *named)
    assert not (folder / "never").exists()


def test_train_refuses_a_shard_without_a_needed_field(good, tmp_path):
    import json

    from tests.unit.test_data import png, record, write_shard

    broken = record()
    del broken["solution"]
    write_shard(tmp_path / "a.tar", [("s0", {"png": png(), "json": json.dumps(broken).encode()})])
    arguments, _ = good
    one_sentence(
        command("megatron_ral.train", *arguments, f"data.train=[{{shards: '{tmp_path}/a.tar'}}]"),
        "a.tar",
        "'s0'",
        "'solution'",
    )


def test_train_refuses_a_checkpoint_that_is_cut_short(good, material, tmp_path):
    import shutil

    shutil.copytree(material["tiny"], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    arguments, _ = good
    one_sentence(
        command("megatron_ral.train", *arguments, f"model.path={tmp_path}/cut"),
        "model.safetensors",
        "not a whole safetensors file",
    )


def test_train_refuses_another_architecture_as_reference(good, material, tmp_path):
    import json
    import shutil

    shutil.copytree(material["tiny"], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    arguments, _ = good
    one_sentence(
        command("megatron_ral.train", *arguments, f"model.reference_path={tmp_path}/other"),
        "model.reference_path",
        "rms_norm_eps = 0.1",
    )


def test_train_refuses_a_folder_without_a_tokenizer(good, material, tmp_path):
    import shutil

    shutil.copytree(material["tiny"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "preprocessor*"))
    arguments, _ = good
    one_sentence(command("megatron_ral.train", *arguments, f"model.path={tmp_path}/bare"), "bare", "tokenizer")


def changed_copy(source, target, file, change):
    """A model folder with one of its JSON files changed."""
    import json
    import shutil

    shutil.copytree(source, target)
    content = json.loads((target / file).read_text())
    change(content)
    (target / file).write_text(json.dumps(content))
    return target


def test_train_refuses_a_teacher_with_another_visual_grid(good, material, tmp_path):
    arguments, _ = good
    other = changed_copy(
        material["teacher"],
        tmp_path / "coarse",
        "config.json",
        lambda config: config["vision_config"].update(patch_size=28),
    )
    one_sentence(
        command("megatron_ral.train", *arguments, f"teacher.path={other}"),
        "teacher.path",
        "vision_config.patch_size = 28",
        "has 14",
        "model.path",
    )
    other = changed_copy(
        material["teacher"],
        tmp_path / "grey",
        "preprocessor_config.json",
        lambda config: config.update(image_mean=[0.5, 0.5, 0.25]),
    )
    one_sentence(
        command("megatron_ral.train", *arguments, f"teacher.path={other}"), "teacher.path", "image_mean", "0.25"
    )
    one_sentence(
        command("megatron_ral.train", *arguments, f"teacher.path={material['qwen3']}"),
        "'qwen3_vl'",
        "'qwen2_5_vl'",
        "teacher.path",
    )


def test_train_refuses_a_teacher_with_another_tokenizer(good, material, tmp_path):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    arguments, _ = good
    other = changed_copy(material["teacher"], tmp_path / "swapped", "tokenizer.json", swap)
    one_sentence(
        command("megatron_ral.train", *arguments, f"teacher.path={other}"),
        "teacher.path has another tokenizer than model.path",
        "token 'a' has id",
        "distil from",
    )
    other = changed_copy(
        material["teacher"], tmp_path / "merges", "tokenizer.json", lambda content: content["model"]["merges"].pop()
    )
    one_sentence(
        command("megatron_ral.train", *arguments, f"teacher.path={other}"), "another tokenizer", "merges[", "missing"
    )


def test_train_refuses_a_teacher_that_does_not_fit(good, material, tmp_path, monkeypatch):
    """72 billion parameters, from their published configuration alone: no weights are looked for first."""
    import json

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")  # this process's share is small on a large machine too
    arguments, folder = good
    tokens = {
        name: value
        for name, value in json.loads((material["tiny"] / "config.json").read_text()).items()
        if name.endswith("_token_id")
    }
    huge = changed_copy(
        PROJECT / "pretrained_configs" / "models" / "qwen2.5-vl-72b",
        tmp_path / "huge",
        "config.json",
        lambda config: config.update(tokens),
    )
    result = command("megatron_ral.train", *arguments, f"teacher.path={huge}", f"train.output_dir={folder}/never")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    [line] = [line for line in result.stderr.splitlines() if "does not fit" in line]  # its weights are missing besides
    for part in ("teacher.path", "136.7 GiB of each", "GiB are free", "more ranks"):
        assert part in line, line
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    "world, settings, named",
    [
        (1, ["teacher.tensor_model_parallel_size=2"], ["teacher", "2 * 1", "world size 1"]),
        (4, ["teacher.tensor_model_parallel_size=4"], ["teacher.tensor_model_parallel_size = 4", "6 attention heads"]),
        (1, ["distill.attention_layers=[7]"], ["distill.attention_layers", "7", "4 layers"]),
        (1, ["distill.teacher_rollouts=0.5"], ["distill.teacher_rollouts", "loss.policy_coef = 1.0"]),
        (1, ["distill.token_divergence=cross_entropy"], ["distill.token_divergence", "teacher_rollouts = 1"]),
        (
            1,
            ["distill.teacher_rollouts=1.0", "loss.policy_coef=0.0"],
            ["distill.teacher_rollouts", "attention_coef = 1.0"],
        ),
        (1, ["loss.filter_equal_rewards=true"], ["loss.filter_equal_rewards", "teacher"]),
        (1, ["distill.top_tokens=501"], ["distill.top_tokens = 501", "500 tokens"]),
        (1, ["distill.beta=1.0"], ["distill.beta", "1.0"]),
    ],
)
def test_train_refuses_settings_of_distillation(good, material, world, settings, named):
    arguments, _ = good
    one_sentence(
        command("megatron_ral.train", *arguments, f"teacher.path={material['teacher']}", *settings, world=world), *named
    )


def test_evaluate_refuses(good):
    arguments, _ = good
    one_sentence(
        command("megatron_ral.evaluate", *arguments, "--output", "x.json", "--model", "nowhere"), "--model", "nowhere"
    )


def test_dry_run_prints_configuration_and_layout_and_trains_nothing(good):
    arguments, folder = good
    result = command(
        "megatron_ral.train",
        *arguments,
        "parallel.pipeline_model_parallel_size=2",
        "--dry-run",
        f"train.output_dir={folder}/never",
        "rollout={num_prompts: 8, num_minibatches: 2, overlap: true}",
        world=4,
    )  # settings on both sides of a flag
    assert result.returncode == 0, result.stderr
    assert "pipeline_model_parallel_size: 2" in result.stdout
    assert "4 ranks = tensor 1 x pipeline 2 x data 2" in result.stdout
    assert "the model: 1,387,808 parameters" in result.stdout
    assert "sampled 2 updates before, with loss.sampler_correction = token_truncate; the native sam" in result.stdout
    assert "A rank then holds 4 more prompts with their responses in host memory" in result.stdout
    assert not (folder / "never").exists()

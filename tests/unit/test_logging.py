"""Loggers of a run: which are opened, what they are given, the settings that runs are compared by; FLOPs of a step."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ral.config.distill import TeacherConfig
from megatron_ral.config.loss import LossConfig
from megatron_ral.config.sections import TrainConfig
from megatron_ral.config.watching import LoggingConfig
from megatron_ral.errors import ConfigError, DataError
from megatron_ral.models.flops import group_flops, tower_flops_per_patch
from megatron_ral.models.shape import read_shape
from megatron_ral.training.logging import loggers
from megatron_ral.training.logging.base import RunLogger
from megatron_ral.training.logging.loggers import Loggers, logger_class, logger_names
from megatron_ral.training.logging.tensorboard import TensorBoardLogger, TensorBoardSettings
from megatron_ral.training.logging.throughput import Throughput, ThroughputSettings, known_peak_tflops
from megatron_ral.training.trainer import Inputs
from tests.distributed.cases import make_config

METHODS = ("scalars", "completions", "evaluation", "probes", "close")


def test_peaks():
    assert known_peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.0
    assert known_peak_tflops("NVIDIA H100 PCIe", "bfloat16") == 756.0
    assert known_peak_tflops("NVIDIA A100-SXM4-80GB", "float32") == 0.0 == known_peak_tflops("a card", "bfloat16")


def hyperparameters(config) -> dict:
    return dict(TensorBoardSettings.from_config(config).hyperparameters)


def method(config) -> str:
    return str(hyperparameters(config)["_method"])


def test_settings_are_flat_and_runs_have_a_method():
    config = make_config("m")
    flat = hyperparameters(config)
    assert (
        flat["_method"] == "ral" and flat["data.train.0.shards"] == "unused" and flat["loss.attention_layers"] == "-1"
    )
    assert flat["loss.attention_coef"] == 2.0 and flat["logging.tensorboard"] is True and flat["reward.functions"] == ""
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())
    grpo = replace(config, loss=LossConfig(attention_coef=0.0))
    assert method(grpo) == "grpo" and hyperparameters(grpo).keys() == flat.keys()
    assert method(replace(config, loss=LossConfig(attention_coef=0.0, policy_loss="gspo"))) == "gspo"
    assert method(replace(config, train=TrainConfig(algorithm="sft"))) == "sft"
    assert method(replace(grpo, teacher=TeacherConfig(path="t"))) == "distill"
    assert LoggingConfig().peak_tflops == 0.0


def test_every_switch_among_the_settings_has_a_logger():
    assert "tensorboard" in logger_names()
    for name in logger_names():
        logger = logger_class(name)
        assert all(callable(getattr(logger, method)) for method in (*METHODS, "from_config")), name
        assert logger.packages, name
    assert [(name, getattr(LoggingConfig(), name)) for name in logger_names()] == [("tensorboard", True), ("wandb", "")]
    assert {field.name for field in fields(LoggingConfig)} > set(logger_names())
    assert all(hasattr(RunLogger, method) and hasattr(Loggers, method) for method in METHODS)


def test_every_logger_gets_every_call_in_order():
    calls = []

    class Recorder:
        def __init__(self, name):
            for method in METHODS:
                setattr(self, method, lambda *values, method=method: calls.append((name, method, *values)))

    loggers = Loggers([Recorder("a"), Recorder("b")])
    for each in (loggers, Loggers()):
        each.scalars({"loss": 1.0}, 1)
        each.completions(["batch"], 2)
        each.evaluation("result", 3)
        each.probes(["view"], "video", 4)
        each.close(5)
    expected = [
        ("scalars", {"loss": 1.0}, 1),
        ("completions", ["batch"], 2),
        ("evaluation", "result", 3),
        ("probes", ["view"], "video", 4),
        ("close", 5),
    ]
    assert calls == [(name, *call) for call in expected for name in ("a", "b")]


@pytest.mark.parametrize("tensorboard", [True, False])
def test_loggers_are_opened_by_settings(tmp_path, tensorboard):
    config = make_config("m")
    config = replace(
        config,
        train=replace(config.train, output_dir=str(tmp_path)),
        logging=replace(config.logging, tensorboard=tensorboard),
    )
    log = Loggers.from_config(config)
    assert [type(logger) for logger in log.loggers] == [TensorBoardLogger] * tensorboard
    for step in range(1, 13):
        log.scalars({"loss": float(step), "lr": 0.5}, step)
    by_layer = {f"{name}_by_layer": (0.25, 0.5) for name in BY_LAYER}
    log.evaluation(SimpleNamespace(**dict.fromkeys(EVALUATION, 0.25), **by_layer), 12)
    log.close(12)
    assert (tmp_path / "tensorboard").exists() == tensorboard
    if not tensorboard:
        return
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == {"loss", "lr", "final/loss", *(f"eval/{name}" for name in EVALUATION)} | {
        f"final/eval/{name}" for name in ("accuracy", "format_rate", "target_attention")
    } | {f"eval/{name}/layer_{layer}" for name in BY_LAYER for layer in (0, 1)}
    assert events.Scalars("eval/target_deciding/layer_1")[0].value == 0.5
    assert [event.value for event in events.Scalars("final/loss")] == [7.5], "the mean of the last ten"
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(step, step) for step in range(1, 13)]


def records(file: Path) -> list:
    """Return the records of a W&B file: LevelDB's log of protocol buffers behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part, found = file.read_bytes(), 7, b"", []
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def with_wandb(folder, project="ral"):
    config = make_config("m")
    return replace(
        config,
        train=replace(config.train, output_dir=str(folder)),
        logging=replace(config.logging, tensorboard=False, wandb=project),
    )


def test_wandb_gets_the_scalars_offline_and_a_resumed_run_goes_on_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "my_run"
    folder.mkdir()
    ids = []
    for first in (0, 2, 0):  # a run, its continuation, and another run in the same folder
        before = set((folder / "wandb").glob("offline-run-*"))
        log = Loggers.from_config(with_wandb(folder), first)
        assert len(log.loggers) == 1
        log.scalars({"loss": 1.5 + first, "attention/divergence": float("nan")}, first + 1)
        by_layer = {f"{name}_by_layer": (0.25, 0.5) for name in BY_LAYER}
        log.evaluation(SimpleNamespace(**dict.fromkeys(EVALUATION, 0.25), **by_layer), first + 2)
        log.completions([], first + 2)
        log.probes([], None, first + 2)
        log.close(first + 2)
        [made] = set((folder / "wandb").glob("offline-run-*")) - before
        found = records(next(made.glob("*.wandb")))
        [run] = [record.run for record in found if record.WhichOneof("record_type") == "run"]
        assert (run.project, run.display_name) == ("ral", "my_run")
        settings = {item.key: item.value_json for item in run.config.update}
        assert settings["loss.attention_coef"] == "2.0" and settings["train.algorithm"] == '"ral"'
        rows = [
            {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            for record in found
            if record.WhichOneof("record_type") == "history"
        ]
        assert [int(row["step"]) for row in rows] == [first + 1, first + 2]
        assert rows[0]["loss"] == str(1.5 + first) and rows[0]["attention/divergence"] == "NaN"
        assert rows[1]["eval/accuracy"] == "0.25" and rows[1]["eval/target_peak/layer_1"] == "0.5"
        ids.append(run.run_id)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder named wandb"])
def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, spec):
    monkeypatch.setattr(loggers, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError) as caught:
        Inputs.open(with_wandb(tmp_path), False)
    assert str(caught.value) == (
        "logging.wandb = ral needs the package wandb, which is not installed; install it, or leave the setting out"
    )
    with pytest.raises(DataError, match="data.train"):
        Inputs.open(with_wandb(tmp_path, ""), False)


BY_LAYER = ("target_attention", "target_deciding", "target_peak")
EVALUATION = ("accuracy", "format_rate", "unparsed_rate", "error_rate", "target_attention", "visual_mass")


def flops_of_a_step(material, config, teacher=None) -> float:
    """FLOPs of a micro-batch of one prompt of 5 tokens with responses of 3 and 2 tokens and an image of 16 patches."""
    process_groups = SimpleNamespace(device=torch.device("cpu"))
    meter = Throughput(
        ThroughputSettings.from_config(config), read_shape(str(material["tiny"])), teacher, process_groups
    )
    prompts = SimpleNamespace(prompt_lengths=torch.tensor([5]), prompts=[SimpleNamespace(num_patches=16)])
    return meter._flops(SimpleNamespace(prompts=prompts, response_lengths=torch.tensor([[3, 2]])))


def test_flops_of_a_step_count_its_passes(material):
    """Supervised: an update of three. RL: generation, passes without gradient, and three for each update."""
    shape = read_shape(str(material["tiny"]))
    language, tower = group_flops(shape, 5, [3, 2]), 16 * tower_flops_per_patch(shape)
    config = make_config("m")
    rollout = replace(config.rollout, num_minibatches=2, num_epochs=1)
    config = replace(config, rollout=rollout, loss=LossConfig(kl_coef=0.0))
    assert flops_of_a_step(material, config) == pytest.approx((1 + 0.5 + 3) * language + tower)
    with_reference = replace(config, loss=LossConfig(kl_coef=0.1))
    assert flops_of_a_step(material, with_reference) == pytest.approx((2 + 0.5 + 3) * language + tower)
    two_epochs = replace(config, rollout=replace(rollout, num_epochs=2))
    assert flops_of_a_step(material, two_epochs) == pytest.approx((1 + 1 + 6) * language + tower)
    distilled = flops_of_a_step(material, two_epochs, teacher=shape)
    assert distilled == pytest.approx((8 + 2) * language + (1 + 2) * tower)
    supervised = replace(config, train=TrainConfig(algorithm="sft"))
    assert flops_of_a_step(material, supervised) == pytest.approx(3 * language + tower)
    whole = replace(supervised, model=replace(config.model, train_vision=True))
    assert flops_of_a_step(material, whole) == pytest.approx(3 * (language + tower))

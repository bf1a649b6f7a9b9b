"""The video task through the entry points: steps on mp4 files, contact sheets, evaluation by category."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import PROJECT
from tests.distributed.runner import run_ranks
from tests.integration.cases import RL, SFT, run_training, write_config


def evaluate(config, overrides, model, output, *options, world=1) -> str:
    """`megatron_ral.evaluate` under torchrun; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world),
            "-m",
            "megatron_ral.evaluate",
            "--config",
            config,
            "--model",
            str(model),
            "--output",
            str(output),
            *options,
            *overrides,
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=PROJECT,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_on_clips_and_its_pictures(material, clips, tmp_path):
    """Both algorithms, from shards of mp4 files; the probe is a contact sheet of eight frames."""
    for text, split, steps in ((SFT, "search", 2), (RL, "rl", 1)):
        model = material["tiny"] if text is SFT else tmp_path / "SFT" / "hf"
        output = tmp_path / ("SFT" if text is SFT else "RL")
        path, overrides = write_config(tmp_path, text, model, clips, split)
        run_ranks(
            1,
            run_training,
            path,
            overrides
            + [
                f"train.output_dir={output}",
                f"train.num_steps={steps}",
                "logging.probe_interval=1",
                "logging.num_probes=1",
                "train.checkpoint_interval=0",
                "logging.num_eval_prompts=4",
            ],
        )
        events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
        events.Reload()
        picture = events.Images("attention/probe_0")[-1]
        assert (picture.width, picture.height) == (8 * 120 - 8, 16 + 2 * 114)
        assert json.loads((output / "summary.json").read_text())["quarantined"] == {}
    [share] = [event.value for event in events.Scalars("attention/target_mass")]
    assert 0 < share < 1 and events.Scalars("data/quarantined")[-1].value == 0


@pytest.fixture(scope="module")
def evaluated(material, trained_model, tmp_path_factory):
    """A model that answers, on questions of two types, greedy and sampled."""
    folder = tmp_path_factory.mktemp("evaluated")
    path, overrides = write_config(folder, RL, trained_model, material["data"], "rl")
    overrides = overrides + [f"data.eval_shards={material['data']}/search-*.tar", "logging.num_eval_prompts=41"]
    printed = evaluate(path, overrides, trained_model, folder / "one.json", "--samples", "3")
    evaluate(
        path,
        overrides,
        trained_model,
        folder / "two.json",
        "--samples",
        "3",
        "--completions",
        str(folder / "two.txt"),
        world=2,
    )
    return folder, printed


def test_evaluation_counts_what_the_completions_say(evaluated):
    folder, printed = evaluated
    record = json.loads((folder / "one.json").read_text())
    lines = [json.loads(line) for line in (folder / "one.jsonl").read_text().splitlines()]
    assert record["num_prompts"] == len(lines) == 41 and set(record["categories"]) == {"free-form", "numerical"}
    for name, row in record["categories"].items():
        rows = [line for line in lines if line["category"] == name]
        right = [line["greedy"]["text"].endswith(line["solution"]) for line in rows]
        assert row["num_prompts"] == len(rows) > 5 and row["accuracy"] == pytest.approx(sum(right) / len(rows))
        assert row["accuracy_error"] == pytest.approx(torch.tensor(right).double().std().item() / len(rows) ** 0.5)
        sampled = [[sample["text"].endswith(line["solution"]) for sample in line["sampled"]] for line in rows]
        assert row["sampled_accuracy"] == pytest.approx(sum(map(sum, sampled)) / (3 * len(rows)))
        assert row["best_of_n"] == pytest.approx(sum(map(any, sampled)) / len(rows))
        assert name in printed
    assert 0 < record["accuracy"] < 1 and record["accuracy"] == pytest.approx(record["overall"]["accuracy"])
    assert record["sampling"] == {"num_samples": 3, "temperature": 1.0, "top_p": 1.0, "seed": 1}
    assert any(len({sample["text"] for sample in line["sampled"]}) > 1 for line in lines), "samples differ"
    assert {"accuracy", "format", "unparsed"} <= set(lines[0]["greedy"]["parts"])
    assert all(line["visual_tokens"] == 4 for line in lines)


def test_evaluation_is_the_same_on_two_data_parallel_ranks(evaluated):
    folder, _ = evaluated
    one, two = (json.loads((folder / name).read_text()) for name in ("one.json", "two.json"))
    assert one["categories"] == two["categories"] and one["overall"] == two["overall"]
    one, two = (
        [
            (line["key"], line["greedy"]["text"], [sample["text"] for sample in line["sampled"]])
            for line in map(json.loads, (folder / name).read_text().splitlines())
        ]
        for name in ("one.jsonl", "two.txt")
    )
    assert one == two


def test_report_reads_the_evaluation(evaluated, tmp_path):
    folder, _ = evaluated
    for stage in ("sft", "rl"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "evaluation.json").write_text((folder / "one.json").read_text())
    (tmp_path / "rl" / "summary.json").write_text('{"layout": {}}')
    subprocess.run([sys.executable, "tools/report.py", "--output-dir", str(tmp_path)], check=True, cwd=PROJECT)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rl"]["accuracy"] == json.loads((folder / "one.json").read_text())["accuracy"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--samples", "-1"], "--samples = -1 must not be negative"),
        (["--completions", "{output}"], "is the same file as --output"),
    ],
)
def test_evaluate_refuses(material, tmp_path, options, message):
    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    options = [option.format(output=tmp_path / "e.json") for option in options]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "megatron_ral.evaluate",
            "--config",
            path,
            "--output",
            str(tmp_path / "e.json"),
            *options,
            *overrides,
        ],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "e.json").exists()


def test_unknown_task_is_refused():
    done = subprocess.run(
        ["bash", "launch_scripts/ral_tiny.sh"],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "TASK": "chess"},
    )
    assert done.returncode == 2 and "TASK = chess is neither digit-search nor video-search" in done.stderr


def test_unknown_family_is_refused():
    done = subprocess.run(
        ["bash", "launch_scripts/ral_tiny.sh", "--dry-run"],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "FAMILY": "chess"},
    )
    assert done.returncode == 2 and "argument --family: invalid choice: 'chess'" in done.stderr

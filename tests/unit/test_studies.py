"""What the studies make of finished runs: tables, paired differences, plots; and that a run is made once."""

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from megatron_ral.demo import explored_report, heat_maps, runs
from megatron_ral.demo.thoughts import other_colour
from megatron_ral.evaluation.attention_page import PageSample
from megatron_ral.evaluation.attention_pictures import Panel
from tools import distill_study, explore_tiny, make_tiny_model, study, study_explored, study_thoughts


def finished(run: Path, **curves) -> None:
    """Event files as a run leaves them."""
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for tag, points in curves.items():
            for step, value in points:
                writer.add_scalar(f"eval/{tag}", value, step)


def test_mean_and_error():
    assert runs.mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    mean, error = runs.mean_and_error([5.0])
    assert mean == 5.0 and error != error


def test_table_of_the_study(tmp_path):
    """Two seeds; the arm is 10 and 30 points above GRPO at the end, and 5 and 15 over the run."""
    found = study.Study(tmp_path, 2, 1)
    for seed, gain in ((0, 0.1), (1, 0.3)):
        for name, extra in (("grpo", 0.0), ("oracle", gain)):
            finished(
                found.run(2, seed, name),
                accuracy=[(0, 0.2), (1, 0.4), (2, 0.5 + extra)],
                target_attention=[(0, 0.25), (1, 0.25), (2, 0.25 + extra)],
            )
    result = study.results(found, [2], [0, 1], ["grpo", "oracle"])
    row = result["table"][2]["oracle"]
    assert row["difference"] == pytest.approx([0.1, 0.3]) and row["area_difference"] == pytest.approx([0.05, 0.15])
    study.write_table(result, tmp_path / "study.md")
    lines = (tmp_path / "study.md").read_text().splitlines()
    assert "| SFT | 20.0 +- 0.0 | | | | |" in lines
    assert any(
        line.startswith(f"| {study.ARMS['oracle'].title} | 70.0 +- 10.0 | +20.0 +- 10.0 | +10.0 +- 5.0 | 0.450 |")
        for line in lines
    ), lines
    study.plot(result, tmp_path)
    assert (tmp_path / "study_accuracy.png").stat().st_size > 10_000


def test_table_of_the_distillation_study(tmp_path):
    found = distill_study.Study(tmp_path, 10, 5)
    finished(found.teacher, accuracy=[(0, 0.0), (10, 0.9)])
    for seed, gain in ((0, 0.1), (1, 0.3)):
        for name, extra in (("tokens", 0.0), ("tokens_all", gain), ("tokens_rl", 0.0), ("grpo", -gain)):
            finished(
                found.run(seed, name),
                accuracy=[(0, 0.2), (5, 0.5 + extra), (10, 0.7 + extra)],
                target_attention=[(0, 0.25), (5, 0.3), (10, 0.3)],
            )
    names = ["tokens", "tokens_all", "tokens_rl", "grpo"]
    result = distill_study.results(found, [0, 1], names)
    assert result["rows"]["tokens_all"]["steps_to_goal"] == pytest.approx([10.0, 5.0])
    assert result["rows"]["tokens"]["steps_to_goal"] == [float("inf")] * 2
    assert [row["with_rl"] for row in result["rows"].values()] == [False, False, True, True]
    distill_study.write_table(result, tmp_path / "distill.md")
    text = (tmp_path / "distill.md").read_text()
    assert "Teacher: 90.0 %" in text and "| start | 20.0 +- 0.0 |" in text
    assert "| tokens + attention, all layers | 70.0 +- 10.0 | 90.0 +- 10.0 | 7.5 +- 2.5 | 30.0 +- 0.0 |" in text
    assert "| tokens | 50.0 +- 0.0 | 70.0 +- 0.0 | never | 30.0 +- 0.0 |" in text
    assert "| tokens + attention, all layers | +20.0 +- 10.0 | +20.0 +- 10.0 |" in text
    assert "| RL alone (GRPO) | -20.0 +- 10.0 | -20.0 +- 10.0 |" in text
    distill_study.plot(result, tmp_path)
    assert (tmp_path / "distill_accuracy.png").stat().st_size > 10_000


def test_a_finished_run_is_not_made_again_and_not_mixed_with_other_settings(tmp_path, monkeypatch):
    calls = []

    def call(log, *arguments):
        calls.append(arguments)
        (tmp_path / "run" / "hf").mkdir(parents=True)

    monkeypatch.setattr(runs, "call", call)
    arguments = ("ral_tiny", tmp_path / "model", tmp_path / "run", 0)
    runs.train_once(*arguments, ["a=1"])
    runs.train_once(*arguments, ["a=1"])
    assert len(calls) == 1 and "a=1" in calls[0]
    with pytest.raises(SystemExit, match="other settings"):
        runs.train_once(*arguments, ["a=2"])
    with pytest.raises(SystemExit, match="other settings"):
        runs.train_once("sft_tiny", *arguments[1:], ["a=1"])


def test_a_run_that_fails_names_its_log(tmp_path):
    with pytest.raises(SystemExit, match="run.log"):
        runs.call(tmp_path / "run.log", "-c", "print('what went wrong'); raise SystemExit(3)")
    assert "what went wrong" in (tmp_path / "run.log").read_text()


def test_every_arm_of_the_studies_is_a_configuration():
    """Settings of all arms load on top of the files they change."""
    from megatron_ral.config import load_config
    from megatron_ral.config.rules import setting_warnings

    folder = Path(__file__).parents[2] / "pretrained_configs" / "runs"
    for arm in study.ARMS.values():
        load_config(folder / "ral_tiny.yaml", ["model.path=m", *arm.settings])
    for name, arm in distill_study.ARMS.items():
        teacher = ["teacher.path=t"] if arm.teaches else []
        config = load_config(folder / "distill_tiny.yaml", ["model.path=m", *teacher, *arm.settings])
        assert config.distills == arm.teaches and (config.loss.policy_coef == 1.0) == arm.rl
        if arm.teaches:
            assert not setting_warnings(config), name


def explored_results(file: Path) -> explored_report.Results:
    return explored_report.Results(file, study_explored.settings_of)


def explored_line(seed: int, arm: str, last: float, task: str = "tokens-9") -> dict:
    points = {
        "accuracy": [[0, 0.0], [10, last / 2], [20, last]],
        "gaze_2": [[0, 0.9 if arm == "start" else 0.1], [20, 0.3]],
    }
    points |= {f"gaze_{layer}": [[0, 0.2], [20, 0.9]] for layer in (0, 1, 3)}
    curves = {**points, "equal": [[1, 0.9], [2, 0.8]], "ratio": [[1, 0.5]], "format": [[0, 1.0]]}
    line = {"task": task, "seed": seed, "arm": arm, "seconds": 60.0, "curves": curves}
    return line if arm == "start" else {**line, "settings": list(study_explored.settings_of(task, arm))}


def test_table_of_the_study_of_explored_attention(tmp_path):
    """Two seeds; contrast is 30 and 50 points above GRPO, and reaches GRPO's 20 and 30 after 8 and 7.5 rollouts."""
    results = explored_results(tmp_path / "results.jsonl")
    for seed, base, gain in ((2, 0.2, 0.3), (3, 0.3, 0.5)):
        for arm, last in (("start", 0.9), ("grpo", base), ("contrast", base + gain)):
            results.add(explored_line(seed, arm, last))
    again = explored_results(tmp_path / "results.jsonl")
    assert again.lines == results.lines
    text = explored_report.table(again, "tokens-9", "9 tokens", [2, 3, 4], ["grpo", "contrast", "noise"])
    [row] = [line for line in text if line.startswith("| contrast of explored attention")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["2", "32.5 / 65.0", "40.0 +- 10.0", "+4.0", "8", "30.0 +- 0.0", "0.5", "60"]
    assert not any("noise alone" in line for line in text), "an arm without runs has no row"
    assert text[-2] == (
        "Start: accuracy 0.0 +- 0.0, before the wrong lessons at most 90.0 +- 0.0; 15 % of GRPO's groups are mixed in "
        "its first five rollouts."
    )
    assert explored_report.paired_differences(again, "tokens-9", [2, 3, 4], ["grpo", "contrast", "noise"])[2:] == [
        "| contrast of explored attention - GRPO | 40.0 +- 10.0 | +4.0 | +30, +50 |",
        "",
    ]
    assert explored_report.paired_differences(again, "tokens-9", [2, 3], ["noise"]) == []
    explored_report.plot(again, "tokens-9", "9 tokens", [2, 3], ["grpo", "contrast"], tmp_path)
    assert (tmp_path / "explored_tokens-9.png").stat().st_size > 10_000


def test_rollouts_to_a_level():
    line = {"curves": {"accuracy": [[0, 0.1], [10, 0.1], [20, 0.5]]}}
    assert explored_report.rollouts_to(line, 0.1) == 0
    assert explored_report.rollouts_to(line, 0.3) == 15
    assert explored_report.rollouts_to(line, 0.6) == float("inf")


def test_explored_study_repeats_no_run_and_refuses_other_settings(tmp_path):
    study_of = study_explored.Study(tmp_path, explored_results(tmp_path / "r.jsonl"), 20, 10)
    for seed, arm in ((2, "grpo"), (2, "contrast"), (3, "grpo")):
        study_of.results.add(explored_line(seed, arm, 0.5))
    left = study_explored.missing(study_of, ["tokens-9"], [2, 3], ["grpo", "contrast"])
    assert list(left) == [("tokens-9", 3, "contrast")]
    study_of.results.add({**explored_line(4, "grpo", 0.5), "settings": ["loss.kl_coef=0.1"]})
    with pytest.raises(SystemExit, match="grpo of seed 4 on tokens-9 was run with other settings"):
        study_of.results.find("tokens-9", 4, "grpo")


def test_later_seeds_have_base_models_of_their_own():
    assert {study_explored.base_of("tokens-9", seed) for seed in range(6)} == {0}
    assert [study_explored.base_of("tokens-9", seed) for seed in (6, 7, 20)] == [6, 7, 20]
    assert [study_explored.base_of("own-weights", seed) for seed in (0, 2, 7)] == [0, 2, 7]


def test_seeds_with_weights_of_their_own_share_no_model(tmp_path, monkeypatch):
    """Random weights, single cells, few cells, all cells, all cells in another order."""
    trained, written = [], []
    monkeypatch.setattr(study_explored, "call", lambda log, *arguments: written.append(" ".join(map(str, arguments))))
    monkeypatch.setattr(study_explored, "train_once", lambda *arguments: trained.append(arguments) or 1.0)
    study_of = study_explored.Study(tmp_path, explored_results(tmp_path / "r.jsonl"), 20, 10)
    folder = tmp_path / "own-weights"
    assert study_of.base("own-weights", 3) == folder / "base_3_longer" / "hf"
    chain = [folder / name for name in ("model_3", "reader_3", "few_3", "base_3", "base_3_longer")]
    assert [arguments[1:3] for arguments in trained] == [
        (model if number == 0 else model / "hf", target) for number, (model, target) in enumerate(pairwise(chain))
    ]
    assert [arguments[3] for arguments in trained] == [3, 3, 3, 103]
    assert [model for model in written if "make_tiny_model" in model] == [
        f"tools/make_tiny_model.py --output {folder}/model_3 --force --seed 3 --even-layers 1"
    ]
    lessons = [("lessons/single", 600), ("few_cells/search", 150), ("lessons/search", 250), ("lessons/search", 700)]
    for (*_, settings), (shards, steps) in zip(trained, lessons, strict=True):
        assert f"data.train=[{{shards: '{folder}/{shards}-*.tar', num_samples: {32 * steps}}}]" in settings
    study_of.make_data("own-weights")
    [few] = [text for text in written if "few_cells --force" in text]
    assert few.split("--grid ")[-1].split()[0] == "2" and f"--num-search {32 * 150}" in few


def test_more_visual_tokens_are_learned_from_the_base_model_of_fewer(tmp_path, monkeypatch):
    """The base model of 36 tokens begins as that of 9, and that with random weights; each sees its own pictures. A
    second lesson of the search has another order, and its own number of samples."""
    trained, written = [], []
    tokens_9, tokens_36 = tmp_path / "tokens-9", tmp_path / "tokens-36"
    monkeypatch.setattr(study_explored, "call", lambda log, *arguments: written.append(arguments))
    monkeypatch.setattr(study_explored, "train_once", lambda *arguments: trained.append(arguments) or 1.0)
    study_of = study_explored.Study(tmp_path, explored_results(tmp_path / "r.jsonl"), 20, 10)
    assert study_of.base("tokens-36", 0) == tokens_36 / "base_0_longer" / "hf"
    assert [arguments[1:4] for arguments in trained] == [
        (tokens_9 / "model", tokens_9 / "reader", 0),
        (tokens_9 / "reader" / "hf", tokens_9 / "base_0", 0),
        (tokens_9 / "base_0" / "hf", tokens_36 / "reader", 0),
        (tokens_36 / "reader" / "hf", tokens_36 / "base_0", 0),
        (tokens_36 / "base_0" / "hf", tokens_36 / "base_0_longer", 100),
    ]
    lessons = [("single", 600), ("search", 600), ("single", 300), ("search", 300), ("search", 200)]
    for (_, _, target, _, settings), (split, steps) in zip(trained, lessons, strict=True):
        shards = f"{target.parent}/lessons/{split}-*.tar"
        assert f"data.train=[{{shards: '{shards}', num_samples: {32 * steps}}}]" in settings
        assert f"train.num_steps={steps}" in settings and "optimizer.learning_rate=6.0e-4" in settings
    study_of.make_data("video")
    samples = [" ".join(map(str, arguments)) for arguments in written if "_search.py" in str(arguments[0])]
    assert [(text.split()[0], text.split("--output ")[1].split()[0]) for text in samples] == [
        (f"tools/make_{tool}.py", str(tmp_path / task / kind))
        for task, tool in (("tokens-9", "digit_search"), ("tokens-36", "digit_search"), ("video", "video_search"))
        for kind in ("data", "lessons")
    ]
    assert all("--digits 2 --num-colours 9 --bias 0.99 --bias-by colour" in text for text in samples)


def test_an_arm_pulls_the_layers_that_searched_before_the_wrong_lessons(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(study_explored, "call", lambda log, *arguments: None)
    monkeypatch.setattr(study_explored, "read_curves", lambda run: {})
    monkeypatch.setattr(study_explored, "train_once", lambda *arguments: trained.append(arguments) or 1.0)
    study_of = study_explored.Study(tmp_path, explored_results(tmp_path / "r.jsonl"), 20, 10)
    shares = {0: (0.11, 0.9), 1: (0.87, 0.01), 2: (0.23, 0.9), 3: (0.22, 0.9)}  # before and after the wrong lessons
    gaze = {f"gaze_{layer}": list(enumerate(pair)) for layer, pair in shares.items()}
    study_of.results.add({"task": "tokens-9", "seed": 2, "arm": "start", "curves": gaze})
    study_of.arm("tokens-9", 2, "oracle@searching")
    assert "loss.attention_layers=[1, 2]" in trained[-1][4] and not any("SEARCHING" in text for text in trained[-1][4])
    assert study_of.results.find("tokens-9", 2, "oracle@searching")["layers"] == [1, 2]
    study_of.arm("tokens-9", 2, "oracle")
    assert "loss.attention_layers=[0,1,2,3]" in trained[-1][4]


def test_noise_of_a_task_yields_to_that_of_an_arm():
    grids = {
        arm: [setting for setting in study_explored.settings_of("tokens-36", arm) if ".grid=" in setting]
        for arm in ("grpo", "contrast", "contrast@grid=2")
    }
    assert grids == {
        "grpo": [],
        "contrast": ["rollout.attention_noise.grid=3"],
        "contrast@grid=2": ["rollout.attention_noise.grid=2"],
    }


@pytest.mark.parametrize("arm", study_explored.ARMS)
def test_settings_of_every_arm_are_a_configuration(arm):
    from megatron_ral.config import load_config

    for task in study_explored.TASKS:
        config = load_config(
            runs.PROJECT / "pretrained_configs/runs/ral_tiny.yaml",
            ["model.path=m", *(text.replace("SEARCHING", "[1]") for text in study_explored.settings_of(task, arm))],
        )
        assert (config.loss.kl_coef > 0) == ("@kl" in arm) and config.optimizer.decay == "constant"
        assert (config.rollout.attention_noise.sigma > 0) == any(
            word in arm for word in ("noise", "explored", "contrast")
        ) or "quiet" in arm
        assert config.attention_acts == (not arm.startswith(("grpo", "noise")))


def answered(reply: str, cell: int, reference: str = "42") -> PageSample:
    """A response whose deciding row looks at one cell of 3 x 3 with 80 % of its attention to the picture."""
    row = np.full(9, 0.02)
    row[cell] = 0.16 * 4
    masses = {1: np.stack([np.full(9, 1.0), row])}
    panel = Panel(Image.new("RGB", (84, 84), "navy"), "", [(28, 0, 56, 28)], np.arange(9).reshape(3, 3))
    completion = f"<think>red{reply}</think><answer>{reply}</answer>"
    target = np.arange(9) == 1
    return PageSample(
        "k", "Which digits are red?", reference, completion, 1.0, {}, ["red", reply], 1, masses, target, [panel], 1
    )


def test_shares_of_the_picture_in_a_heat_map():
    shares = heat_maps.picture_shares(answered("42", 1), 1)
    assert shares.sum() == pytest.approx(1) and shares[1] == pytest.approx(0.8)
    assert heat_maps.is_right(answered("42", 1)) and not heat_maps.is_right(answered("24", 1))
    assert heat_maps.given_answer(replace(answered("42", 1), completion="red42")) == "?"


def test_example_of_the_short_comparison_is_one_that_contrast_alone_answers():
    right, wrong = answered("42", 1), answered("17", 5)
    without_row = replace(right, deciding_token=-1)
    start, grpo, contrast = (
        [wrong, wrong, wrong, wrong],
        [right, wrong, wrong, wrong],
        [right, without_row, right, wrong],
    )
    prompt, which = explore_tiny.choose_example([start, grpo, contrast])
    assert [id(sample) for sample in prompt] == [id(start[2]), id(grpo[2]), id(contrast[2])]
    assert which == "the first held-out picture that contrast alone answers rightly"
    prompt, which = explore_tiny.choose_example([[without_row, wrong], [right, right], [right, right]])
    assert prompt == (wrong, right, right) and which == "the first held-out picture"


def test_table_and_picture_of_the_short_comparison(tmp_path):
    """The base model searched in layer 2, where contrast ends at 50 % and GRPO at 20 %."""
    gaze = {0: 0.2, 1: 0.3, 3: 0.1}
    for run, accuracy, share in (
        ("start", [(0, 0.8), (9, 0.0)], [(0, 0.9), (9, 0.05)]),
        ("grpo", [(0, 0.01), (5, 0.05), (10, 0.1)], [(0, 0.04), (5, 0.1), (10, 0.2)]),
        ("contrast", [(0, 0.01), (5, 0.2), (10, 0.45)], [(0, 0.04), (5, 0.3), (10, 0.5)]),
    ):
        layers = {
            f"target_deciding/layer_{layer}": [(step, value) for step, _ in share] for layer, value in gaze.items()
        }
        finished(tmp_path / "seed_3" / run, accuracy=accuracy, **{"target_deciding/layer_2": share}, **layers)
    figures = explore_tiny.Figures.read(explore_tiny.Comparison(tmp_path, 3, (1, 1, 1), 10, 512))
    assert figures.layer == 2 and figures.lead == pytest.approx(0.35)
    assert figures.rows["searcher"] == pytest.approx((0.8, 0.9)) and figures.rows["start"] == pytest.approx(
        (0.01, 0.04)
    )
    text = "\n".join(explore_tiny.table(figures, 10))
    [grpo] = [line for line in text.splitlines() if "of GRPO" in line and "start +" in line]
    assert grpo.split()[-2:] == ["10.0%", "20.0%"]
    assert "Contrast is ahead of GRPO: +35.0 points." in text and "layer 2 of 0 to 3" in text
    assert "NOT ahead" in "\n".join(
        explore_tiny.table(replace(figures, rows=dict.fromkeys(figures.rows, (0.1, 0.1))), 10)
    )
    samples = [
        replace(answered(reply, cell), masses={2: answered(reply, cell).masses[1]})
        for reply, cell in (("17", 5), ("17", 5), ("42", 1))
    ]
    explore_tiny.draw(figures, samples, "the first", 10, tmp_path / "explored.png")
    assert (tmp_path / "explored.png").stat().st_size > 10_000


def test_even_layers_get_no_gradient_in_their_queries_and_keys(tmp_path, capsys):
    arguments = make_tiny_model.parse_arguments(["--output", str(tmp_path / "model"), "--even-layers", "1"])
    model = make_tiny_model.build_model(arguments, make_tiny_model.build_tokenizer(arguments.task, arguments.family))
    tokens = torch.arange(24).reshape(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    first, second = (layer.self_attn for layer in model.model.language_model.layers[:2])
    for name in ("q_proj", "k_proj"):
        for kind, weight in getattr(first, name).named_parameters():
            assert not weight.any() and not weight.grad.any(), (name, kind)
        assert getattr(second, name).weight.grad.any()
    assert first.v_proj.weight.grad.any()
    with pytest.raises(SystemExit):
        make_tiny_model.parse_arguments(["--output", str(tmp_path / "model"), "--even-layers", "4"])
    assert "--even-layers must lie in 0..3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "response, value",
    [
        ("<think>green42</think><answer>42</answer>", 0.0),
        ("<think>red42</think><answer>42</answer>", 1.0),
        ("<think>42</think><answer>42</answer>", 1.0),
        ("<think>red43</think><answer>43</answer>", 0.0),
        ("<think>red, no, green42</think><answer>42</answer>", 1.0),
    ],
)
def test_a_right_answer_behind_another_colour_is_found(response, value):
    assert other_colour(response, "<answer>42</answer>", "numerical", "Which digits are green?") == value


def test_right_answers_by_the_colour_that_they_name():
    def line(asked: str, text: str, accuracy: float) -> str:
        greedy = {"text": text, "parts": {"accuracy": accuracy}}
        return json.dumps({"problem": f"Which digits are {asked}?", "greedy": greedy})

    lines = [
        line("green", "<think>green42</think><answer>42</answer>", 1.0),
        line("green", "<think>red42</think><answer>42</answer>", 1.0),  # right by way of the colour before it
        line("red", "<think>purple42</think><answer>42</answer>", 1.0),  # the palette is a circle
        line("red", "<think>green42</think><answer>42</answer>", 1.0),
        line("white", "<think>white17</think><answer>17</answer>", 0.0),
        line("white", "<answer>17</answer>", 1.0),
    ]
    assert study_thoughts.right_answers(lines) == ({"asked": 1, "before": 2, "other": 2}, 6)


def test_responses_of_other_prompts_or_of_an_older_model_are_made_again(tmp_path, monkeypatch):
    run, counts = tmp_path / "contrast@kl=0.01", []
    (run / "hf").mkdir(parents=True)
    (run / "hf" / "config.json").touch()

    def evaluate(log, *arguments):
        counts.append(int(arguments[-1].removeprefix("logging.num_eval_prompts=")))
        output = arguments[arguments.index("--output") + 1]
        output.with_suffix(".jsonl").write_text("{}\n" * counts[-1])

    monkeypatch.setattr(study_thoughts, "call", evaluate)
    for number in (3, 3, 5):
        assert len(study_thoughts.greedy_responses(run, tmp_path / "data", number)) == number
    assert counts == [3, 5]
    later = (tmp_path / "contrast@kl=0.01.jsonl").stat().st_mtime + 1
    os.utime(run / "hf" / "config.json", (later, later))
    study_thoughts.greedy_responses(run, tmp_path / "data", 5)
    assert counts == [3, 5, 5]

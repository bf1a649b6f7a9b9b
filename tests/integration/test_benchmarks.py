"""Published records of benchmarks through make_shards.py and `megatron_ral.evaluate`; benchmarks of a training step.

The benchmarks of a training step run at a small size, at which their times have no meaning.
"""

import json
import math
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from megatron_ral.commands.shards import make as make_shards
from tests.conftest import PROJECT
from tests.integration.cases import RL, write_config
from tests.integration.test_video_search import evaluate
from tests.unit.shard_faults import picture
from tests.unit.test_video import clip

STAR = [
    {
        "image": "a.png",
        "text": "Which digit is red?\n(A) 1\n(B) 2\n(C) 3",
        "category": category,
        "label": "B",
        "question_id": str(number),
    }
    for number, category in enumerate(["direct_attributes", "relative_position"])
]
CHART = [{"imgname": "a.png", "query": "Which digit is red?", "label": label} for label in ("0.57", "Yes", "3")]
MME = [
    {
        "question_id": "a.png",
        "image": {"bytes": picture(), "path": "a.png"},
        "question": f"Is it {colour}?",
        "answer": answer,
        "category": "color",
    }
    for colour, answer in (("red", "Yes"), ("blue", "No"))
]
MUIR = [
    {
        "idx": "0",
        "task": "Counting",
        "question": "<image> Which is red? <image>",
        "options": ["<image>", "2"],
        "answer": "A",
        "image_list": [{"bytes": picture(), "path": None}] * 3,
    }
]
MVBENCH = [
    {"video": name, "question": "Where?", "candidates": ["Up.", "Down."], "answer": "Down."}
    for name in ("v.webm", "v.mp4", "frames")
]
# name -> records, arguments of make_shards.py, categories with their numbers of prompts
KINDS = {
    "star": (STAR, (), {"direct_attributes": 1, "relative_position": 1}),
    "chart": (CHART, ("--problem-type", "relaxed accuracy", "--category", "human"), {"human": 3}),
    "mme": (MME, ("--keys", "number", "--problem-type", "yes/no", "--group-field", "question_id"), {"color": 2}),
    "muir": (MUIR, (), {"Counting": 1}),
    "mvbench": (MVBENCH, ("--category", "moving_direction"), {"moving_direction": 3}),
}


@pytest.fixture(scope="module")
def shards(material, tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    media = root / "media"
    (media / "frames").mkdir(parents=True)
    (media / "a.png").write_bytes(picture(56, 56))
    for name in ("v.webm", "v.mp4"):
        (media / name).write_bytes(clip(name[2:], 12))
    for number in range(5):
        (media / "frames" / f"{number}.jpg").write_bytes(picture(64, 48, "jpg"))
    for name, (records, options, _) in KINDS.items():
        source = root / (f"{name}.parquet" if name in ("mme", "muir") else f"{name}.jsonl")
        if source.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), source)
        else:
            source.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert (
            make_shards(
                [
                    "--input",
                    str(source),
                    "--media",
                    str(media),
                    "--output",
                    str(root / "out" / name),
                    "--model",
                    str(material["tiny"]),
                    "--workers",
                    "1",
                    *options,
                ]
            )
            == 0
        )
        assert (root / "out" / name / "rejects.jsonl").read_text() == ""
    return root / "out"


def test_one_table_over_all_kinds(shards, material, tmp_path, trained_model):
    path, overrides = write_config(tmp_path, RL, trained_model, material["data"], "rl")
    overrides += [
        f"data.eval_shards={shards}/*/*.tar",
        "reward.accuracy=by_type",
        "data.max_prompt_length=400",
        "logging.num_eval_prompts=100",
        "rollout.max_response_length=4",
    ]
    printed = evaluate(path, overrides, trained_model, tmp_path / "e.json")
    record = json.loads((tmp_path / "e.json").read_text())
    wanted = {name: count for _, _, categories in KINDS.values() for name, count in categories.items()}
    assert {name: row["num_prompts"] for name, row in record["categories"].items()} == wanted
    assert record["num_prompts"] == 11 and record["left_out"] == {} and record["reward_accuracy"] == "by_type"
    assert record["categories"]["color"]["num_groups"] == 1 and all(name in printed for name in wanted)
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert {line["solution"] for line in lines if line["category"] == "moving_direction"} == {"<answer>B</answer>"}
    assert all(line["visual_tokens"] > 0 for line in lines)
    [counted] = [line for line in lines if line["category"] == "Counting"]
    assert counted["visual_tokens"] == 3 and counted["problem"].startswith(
        "[image 1] Which is red? [image 2]\nOptions:\nA. [image 3]"
    )


SMALL = ["--prompt-length", "64", "--group-size", "2", "--length", "4", "--rounds", "1"]


def small_run(name: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", f"tools.benchmarks.{name}", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_ral_over_grpo_extrapolates_what_it_prints():
    lines = small_run("ral_over_grpo", *SMALL, "--layers", "1", "2", "--rollouts", "1", "--vocab-size", "512")
    rows = [re.split(r"\s{2,}", line)[:2] for line in lines]
    one = ["grpo", "bare grpo", "ral", "contrast"]
    for layers, sides in ((1, one), (2, [*one, "ral all layers", "contrast two"])):
        assert [name for name, *rest in rows if rest == [str(layers)]] == [*sides, "adamw", "rollout", "noisy rollout"]
    [formula] = [line for line in lines if line.startswith("step(L, recorded)")]
    part = {name: float(value) for name, value in re.findall(r"(fixed|layer|term|measured) (-?\d+\.\d+)", formula)}
    every = float(re.search(r"([-\d.]+) \(each of all\)", formula)[1])
    bare = part["fixed"] + 28 * part["layer"]
    wanted = {
        "": (bare + part["term"]) / (bare + part["measured"]),
        "_bare": (bare + part["term"]) / bare,
        "_all_layers": (bare + 28 * every) / (bare + part["measured"]),
    }
    ratios = dict(line.split()[1:] for line in lines if line.startswith("ratio "))
    assert lines[-1] == f"ratio ral_over_grpo {ratios['ral_over_grpo']}" and len(ratios) == 9
    for name, value in wanted.items():
        assert float(ratios[f"ral_over_grpo{name}"]) == pytest.approx(value, abs=0.01)


def test_group_layout_benchmark_compares_the_same_gradient_and_counts_the_tower():
    lines = small_run("group_layout", *SMALL, "--layers", "1", "--prompts", "3")
    table = {name: line.split()[1] for line in lines for name in ("group", "separate") if line.startswith(name + " ")}
    assert table == {"group": str(64 + 2 * 4), "separate": str(2 * (64 + 4))}
    [difference] = [float(line.split()[6]) for line in lines if line.startswith("gradients of both sides differ by ")]
    assert 0 < difference < 1e-5
    assert any(line.endswith("3 prompts with 2 responses each: 3 calls, 3 pictures") for line in lines)
    assert lines[-3] == "ratio group_layout_tower 1.00" and lines[-2].startswith("ratio group_layout_old ")
    assert re.fullmatch(r"ratio group_layout \d+\.\d{3}", lines[-1])


def test_padding_compares_as_many_useful_tokens():
    lines = small_run("padding", "--groups", "2", "--group-size", "2", "--layers", "1", "--rounds", "1")
    rows = {
        found[1]: [float(cell.replace(",", "")) for cell in found[2].split()]
        for found in (re.match(r"(equal|different|by groups|padded) +(\d.*)", line) for line in lines)
        if found
    }
    micro_batches, tokens, seconds, _ = zip(*(rows[name] for name in ("equal", "different", "by groups", "padded")))
    assert tokens[0] == tokens[1] == tokens[2] < tokens[3] and micro_batches[2:] == (2.0, 2.0)
    ratios = [(line.split()[1], float(line.split()[2])) for line in lines if line.startswith("ratio ")]
    assert [name for name, _ in ratios] == ["padding", "padding_by_groups", "padding_before"]
    for (_, ratio), own in zip(ratios, seconds[1:]):
        assert ratio == pytest.approx(own / seconds[0], rel=0.05)


def test_growth_prints_the_slope_of_its_table():
    lines = small_run("growth", "--layers", "1", "--rounds", "1", "--series", "P", "--largest", "1024")
    small, large = ([float(cell.replace(",", "")) for cell in line.split()[1:]] for line in lines if line[:2] == "P ")
    assert [row[:5] for row in (small, large)] == [[512, 128, 8, 1, 1576], [1024, 128, 8, 1, 2088]]
    ratios = {line.split()[1]: float(line.split()[2]) for line in lines if line.startswith("ratio ")}
    assert set(ratios) == {"growth_P", "memory_P"}
    for name, column in (("growth_P", 5), ("memory_P", 7)):
        assert ratios[name] == pytest.approx(math.log2(large[column] / small[column]), abs=0.03)


def test_generation_draws_the_tokens_of_transformers():
    sizes = ["--prompts", "2", "--group-size", "2", "--length", "8"]
    lines = small_run("generation", "--cores", "1", "--clock", "cpu", *sizes)
    assert "greedy tokens that agree with transformers: one stage 1.000" in lines
    names = [line.split()[1] for line in lines if line.startswith("ratio ")]
    assert names == ["generation_ended", "generation_decoding", "generation"]


def test_both_samplers_draw_the_same_and_the_ratios_are_those_of_the_table():
    """Stock transformers answers in vLLM's place. It draws with the native sampler's numbers, so that tokens agree."""
    sizes = ["--prompts", "2", "--group-size", "2", "--length", "4", "--rounds", "1", "--num-layers", "2"]
    server = ["--engine", "tests/stock_engine.py", "--python", sys.executable]
    lines = small_run("samplers", *sizes, *server)
    rows = {
        tuple(line.split()[:2]): line.split()[2:] for line in lines if re.match(r"(native|modules|vllm) +[pt]", line)
    }
    ratios = {line.split()[1]: float(line.split()[2]) for line in lines if line.startswith("ratio ")}
    for kind in ("pictures", "texts"):
        ours, modules, theirs = ([float(value) for value in rows[side, kind]] for side in ("native", "modules", "vllm"))
        assert ours[-1] == modules[-1] == theirs[-1] < -1, "mean log-probabilities of the tokens"
        assert min(*ours[:2], *theirs[:2]) > 0, "seconds"
        for column, name in ((2, f"samplers_{kind}"), (3, f"samplers_decoding_{kind}")):
            assert ratios[name] == pytest.approx(ours[column] / theirs[column], rel=0.05, abs=0.01)
    [(ready, _, peak, over)] = [map(float, line.split()[1:5]) for line in lines if re.match(r"native +\d", line)]
    assert 100 < ready < peak and over == pytest.approx(peak - ready, abs=1.01)
    assert len(ratios) == 7 and lines[-1].startswith("ratio samplers_memory ")


def test_the_loader_is_compared_with_the_resize_that_equals_the_image_processor():
    sizes = ["--num-samples", "8", "--size", "100x75", "--batch-size", "4", "--threads", "1"]
    lines = small_run("loader", *sizes, "--rounds", "1", "--epochs", "2")
    verdicts = {found[1]: found[2] for line in lines if (found := re.match(r"resize +[\d.]+ ms  ([^:]*): (.*)", line))}
    assert verdicts["Pillow"] == "equal bit for bit"
    assert verdicts["torch.nn.functional.interpolate"].endswith("of bytes differ from the image processor")
    rates = {line.split()[0]: line.split()[1:4:2] for line in lines if line.split()[2:3] == ["samples/s"]}
    assert list(rates) == ["decoding", "limit", "processor", "loader", "numbers"]
    ratios = {line.split()[1]: float(line.split()[2]) for line in lines if line.startswith("ratio ")}
    assert list(ratios) == ["loader_processor_time", "loader"]
    (limit, limit_time), (loader, loader_time) = (map(float, rates[name]) for name in ("limit", "loader"))
    assert ratios["loader"] == pytest.approx(loader / limit, abs=0.01)
    assert ratios["loader_processor_time"] == pytest.approx(limit_time / loader_time, abs=0.2)

"""Records of the named benchmarks, as published -> make_shards.py -> `megatron_ral.evaluate`: one table of all of them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.integration.cases import RL, write_config
from tests.integration.test_video_search import evaluate
from tests.unit.shard_faults import picture
from tests.unit.test_video import clip
from tools import make_shards

STAR = [{"image": "a.png", "text": "Which digit is red?\n(A) 1\n(B) 2\n(C) 3", "category": category, "label": "B",
         "question_id": str(number)} for number, category in enumerate(["direct_attributes", "relative_position"])]
CHART = [{"imgname": "a.png", "query": "Which digit is red?", "label": label} for label in ("0.57", "Yes", "3")]
MME = [{"question_id": "a.png", "image": {"bytes": picture(), "path": "a.png"}, "question": f"Is it {colour}?",
        "answer": answer, "category": "color"} for colour, answer in (("red", "Yes"), ("blue", "No"))]
MUIR = [{"idx": "0", "task": "Counting", "question": "<image> Which is red? <image>", "options": ["<image>", "2"], "answer": "A",
         "image_list": [{"bytes": picture(), "path": None}] * 3}]
MVBENCH = [{"video": name, "question": "Where?", "candidates": ["Up.", "Down."], "answer": "Down."}
           for name in ("v.webm", "v.mp4", "frames")]
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
        assert make_shards.main(["--input", str(source), "--media", str(media), "--output", str(root / "out" / name), "--model",
                                 str(material["tiny"]), "--workers", "1", *options]) == 0
        assert (root / "out" / name / "rejects.jsonl").read_text() == ""
    return root / "out"


def test_one_table_over_all_kinds(shards, material, tmp_path, taught):
    path, overrides = write_config(tmp_path, RL, taught, material["data"], "rl")
    overrides += [f"data.eval_shards={shards}/*/*.tar", "reward.accuracy=by_type", "data.max_prompt_length=400",
                  "logging.num_eval_prompts=100", "rollout.max_response_length=4"]
    printed = evaluate(path, overrides, taught, tmp_path / "e.json")
    record = json.loads((tmp_path / "e.json").read_text())
    wanted = {name: count for _, _, categories in KINDS.values() for name, count in categories.items()}
    assert {name: row["num_prompts"] for name, row in record["categories"].items()} == wanted
    assert record["num_prompts"] == 11 and record["left_out"] == {} and record["reward_accuracy"] == "by_type"
    assert record["categories"]["color"]["num_groups"] == 1 and all(name in printed for name in wanted)
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert {line["solution"] for line in lines if line["category"] == "moving_direction"} == {"<answer>B</answer>"}
    assert all(line["visual_tokens"] > 0 for line in lines)
    [counted] = [line for line in lines if line["category"] == "Counting"]
    assert counted["visual_tokens"] == 3 and counted["problem"].startswith("[image 1] Which is red? [image 2]\nOptions:\nA. [image 3]")

"""Published layouts -> shards: what is read, what is rejected and why, and a killed run that goes on."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from megatron_ral.data.faults import SampleError
from megatron_ral.data.index import index_path, open_index
from megatron_ral.data.layouts import read_record
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample, shard_entries
from tests.unit.shard_faults import picture, pixel_bomb
from tests.unit.test_data import loader
from tests.unit.test_video import clip, overwrite
from tools import inspect_shards, make_shards


def video_r1(number: int, **changes) -> dict:
    return {"problem_id": number, "problem": "Which digit is red?", "data_type": "image", "problem_type": "numerical",
            "options": [], "process": "<think>red</think>", "solution": "<answer>7</answer>", "path": "./a/red.png", **changes}


CHAT = {"id": "chat-1", "messages": [
    {"role": "system", "content": "Look well."},
    {"role": "user", "content": [{"type": "image", "image": "a/red.png"}, {"type": "image", "image": "wide.jpg"},
                                 {"type": "text", "text": "Which is wider?"}]},
    {"role": "assistant", "content": "<think>the second</think><answer>second</answer>"}]}
V_STAR = {"question_id": 15, "image": "wide.jpg", "question": "What colour is it?", "options": ["red", "blue"], "label": "B",
          "bbox": [[2, 3, 10, 20]], "category": "direct_attributes"}
FRAMES = video_r1(20, data_type="video", path="clip", fps=2.0, problem_type="free-form")
# reason -> a record that is rejected for it
BAD = {
    "missing_field": video_r1(30, solution=None),
    "broken_image": video_r1(31, path="broken.jpg"),
    "image_too_large": video_r1(32, path="bomb.png"),
    "broken_video": video_r1(33, path="empty.mp4", data_type="video"),
    "target_box": {**V_STAR, "question_id": 34, "bbox": [[2, 3, 1000, 20]]},
    "answer_not_in_options": {**V_STAR, "question_id": 35, "label": "green"},
    "refused_path": video_r1(36, path="../outside.png"),
    "missing_media": video_r1(38, path="nowhere.png"),
    "special_token": video_r1(39, problem="What does <|image_pad|> mean?"),
    "unreadable_text": video_r1(40, problem="half \ud800 a pair"),
    "wrong_field": video_r1(41, data_type="smell"),
    "duplicate_key": video_r1(0),
}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "a").mkdir()
    (folder / "clip").mkdir()
    (folder / "a" / "red.png").write_bytes(picture(56, 56))
    (folder / "wide.jpg").write_bytes(picture(90, 40, "jpg", "blue"))
    (folder / "broken.jpg").write_bytes(picture(56, 56, "jpg")[:300])
    (folder / "bomb.png").write_bytes(pixel_bomb())
    (folder / "v.mov").write_bytes(clip("mp4", 20))
    (folder / "empty.mp4").write_bytes(overwrite(clip("mp4"), b"stsz", 8, bytes(4)))
    (folder.parent / "outside.png").write_bytes(picture())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    for number in range(6):
        (folder / "clip" / f"{number:03d}.PNG").write_bytes(picture(64, 48, colour=(40 * number, 0, 0)))
    return folder


@pytest.fixture(scope="module")
def records():
    plenty = [video_r1(number, path=["a/red.png", "wide.jpg"] if number % 3 == 0 else "wide.jpg") for number in range(8)]
    urls = [video_r1(50, path="pipe:cat /etc/passwd"), video_r1(51, path="http://host/a.png"), video_r1(52, path="link.png")]
    return plenty + [CHAT, V_STAR, FRAMES, video_r1(21, data_type="video", path="v.mov"),
                     video_r1(22, data_type="text", path=[])] + list(BAD.values()) + urls


def arguments(source, media, output, material, *rest) -> list[str]:
    return ["--input", str(source), "--media", str(media), "--output", str(output), "--model", str(material["tiny"]),
            "--shard-size", "5", "--workers", "1", *map(str, rest)]


@pytest.fixture(scope="module")
def made(records, media, material, tmp_path_factory):
    """The records as JSONL with a line that is no UTF-8, made into shards in one go."""
    root = tmp_path_factory.mktemp("made")
    lines = [json.dumps(record).encode() for record in records] + [b'{"problem": "\xff"}']
    (root / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert make_shards.main(arguments(root / "train.jsonl", media, root / "out", material)) == 0
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- layouts ----------------------------------------------------------------------------------------------------------------

def test_fields_of_the_layouts():
    chat, star = read_record(CHAT), read_record(V_STAR)
    assert chat.fields["problem"] == "Look well.\nWhich is wider?" and chat.images == ("a/red.png", "wide.jpg")
    assert chat.fields["process"] == "<think>the second</think>" and chat.fields["solution"] == "<answer>second</answer>"
    assert star.fields["problem"] == "What colour is it?\nOptions:\nA. red\nB. blue"
    assert star.fields["solution"] == "<answer>B</answer>" and star.fields["problem_type"] == "multiple choice"
    assert star.fields["target_boxes"] == [[2, 3, 12, 23]] and star.fields["category"] == "direct_attributes"
    assert read_record({**V_STAR, "label": "Red"}).fields["solution"] == "<answer>A</answer>"
    assert read_record({**V_STAR, "label": 1}).fields["solution"] == "<answer>B</answer>"
    lettered = read_record(video_r1(1, options=["A. 3", "B. 7"], solution="<answer>B</answer>"))
    assert lettered.fields["problem"] == "Which digit is red?\nOptions:\nA. 3\nB. 7"
    placed = read_record({"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "7"}],
                          "images": ["a.png"]})
    assert placed.fields["problem"] == "What?" and placed.images == ("a.png",)
    assert placed.fields["solution"] == "<answer>7</answer>"


@pytest.mark.parametrize("record, said", [
    ([1], "not an object"), ({"x": 1}, "none of the fields"), ({"messages": [{"role": "tool"}]}, "role 'tool'"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
     "more than one question"),
    ({"messages": [{"role": "user", "content": "<image> a"}, {"role": "assistant", "content": "b"}]}, "<image> 1 times"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type 'audio'"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
    (video_r1(1, path=None), "'path' names nothing"), (video_r1(1, path=7), "must name files"),
    ({**V_STAR, "label": 2}, "answer 2 is none of the 2"), ({**V_STAR, "bbox": [[1, 2]]}, "'bbox' must be")])
def test_records_that_no_layout_reads(record, said):
    with pytest.raises(SampleError, match=said):
        read_record(record)


# --- shards -----------------------------------------------------------------------------------------------------------------

def test_good_samples_are_in_the_shards_and_bad_ones_in_the_report(made, records, material):
    shards = sorted(map(str, (made / "out").glob("*.tar")))
    assert len(shards) == -(-(len(records) + 1) // 5)
    keys = [entry["__key__"] for entry in shard_entries(shards)]
    assert keys == [str(number) for number in range(8)] + ["chat-1", "15", "20", "21", "22"]
    rejects = [json.loads(line) for line in (made / "out" / "rejects.jsonl").read_text().splitlines()]
    found = {(reject["key"], reject["reason"]) for reject in rejects}
    named = {(str(record.get("problem_id", record.get("question_id"))), reason) for reason, record in BAD.items()}
    assert found == named | {("50", "refused_path"), ("51", "refused_path"), ("52", "refused_path"),
                             (f"{len(records):08d}", "unreadable_text")}
    for reject in rejects:
        assert f"'{reject['key']}'" in reject["text"]
    summary = json.loads((made / "out" / "dataset.json").read_text())
    assert summary["num_samples"] == 13 and summary["rejects"] == Counter(reject["reason"] for reject in rejects)
    # what the index says is what the processor makes, and a run reads all of it without a warning
    processor = PromptProcessor(str(material["tiny"]), 4096)
    for shard in shards:
        index = open_index(shard)
        assert not index.note and index.fingerprint == processor.fingerprint()
        for entry, length in zip(shard_entries([shard]), index.prompt_lengths):
            assert len(processor(parse_sample(entry)).input_ids) == length
    stream = loader(made / "out" / "*.tar", processor)
    assert sorted(prompt.sample.key for prompt in stream.take(13)) == sorted(keys) and not stream.quarantined
    frames = next(prompt for prompt in stream.take(13) if prompt.sample.key == "20")
    assert frames.sample.videos[0].fps == 2.0 and len(frames.sample.videos[0].pictures) == 6


def test_a_killed_run_goes_on_to_the_same_result(made, media, material, tmp_path):
    output = tmp_path / "out"
    script = ("import sys; sys.path.insert(0, sys.argv.pop(1)); from tools import make_shards as m\n"
              "build, done = m.ShardMaker.build, []\n"
              "def stop(self, number, records):\n"
              "    if number == 2:\n"
              "        import os\n"
              "        (self.output / 'shard-000002.partial').write_bytes(b'half')\n"
              "        os._exit(9)\n"
              "    build(self, number, records)\n"
              "m.ShardMaker.build = stop\n"
              "m.main(sys.argv[1:])\n")
    project = Path(make_shards.__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", script, str(project),
                             *arguments(made / "train.jsonl", media, output, material)], capture_output=True)
    assert killed.returncode == 9, killed.stderr.decode()
    assert len(list(output.glob("*.tar"))) == 2 and not (output / "dataset.json").exists()
    kept = index_path(output / "shard-000000.tar").stat().st_mtime_ns
    assert make_shards.main(arguments(made / "train.jsonl", media, output, material)) == 0
    assert content(output) == content(made / "out")
    assert index_path(output / "shard-000000.tar").stat().st_mtime_ns == kept, "a finished shard is not made again"
    assert make_shards.main(arguments(made / "train.jsonl", media, output, material)) == 0, "a finished set is left alone"
    assert make_shards.main(arguments(made / "train.jsonl", media, output, material, "--keys", "number")) == 2
    assert content(output) == content(made / "out")


def test_json_and_parquet_give_the_same_shards(records, media, material, tmp_path):
    import pyarrow
    import pyarrow.parquet

    chosen = []
    for record in records[:8]:
        paths = [record["path"]] if isinstance(record["path"], str) else record["path"]
        chosen.append({name: value for name, value in record.items() if name != "options"} | {"path": paths})
    (tmp_path / "a.json").write_text(json.dumps(chosen))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chosen), tmp_path / "a.parquet")
    embedded = [{"problem": "What?", "solution": "7", "data_type": "image", "problem_id": number,
                 "path": {"bytes": (media / "a/red.png").read_bytes(), "path": "red.png"}} for number in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(embedded), tmp_path / "b.parquet")
    outputs = []
    for name in ("a.json", "a.parquet", "b.parquet"):
        output = tmp_path / f"out-{name}"
        assert make_shards.main(arguments(tmp_path / name, media, output, material)) == 0
        outputs.append({file: data for file, data in content(output).items() if file != "dataset.json"})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 5
    [one, *_] = shard_entries([str(tmp_path / "out-b.parquet" / "shard-000000.tar")])
    assert one["png"] == embedded[0]["path"]["bytes"] and parse_sample(one).solution == "<answer>7</answer>"


@pytest.mark.parametrize("text, said", [("{", "no JSON in UTF-8"), ('{"a": 1}', "must hold a list")])
def test_input_that_is_no_list_of_records(text, said, media, material, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    assert make_shards.main(arguments(tmp_path / "a.json", media, tmp_path / "out", material)) == 2
    assert said in capsys.readouterr().err


def test_inspection_counts_and_draws(made, capsys, tmp_path):
    assert inspect_shards.main([str(made / "out"), "--output", str(tmp_path / "sheet.png"), "--num-samples", "13"]) == 0
    report = capsys.readouterr().out
    assert "13 samples in 6 shards" in report and "1 with target boxes" in report
    assert "numerical 10" in report and "letter 1" in report and "number 11" in report
    assert "prompt lengths: min" in report and "0 images, 1 videos 2" in report
    assert Image.open(tmp_path / "sheet.png").size == (4 * 280, 4 * (280 + 7 * 15 + 8))
    [boxed] = [entry for entry in shard_entries(sorted(map(str, (made / "out").glob("*.tar")))) if entry["__key__"] == "15"]
    cell = inspect_shards.draw_sample(parse_sample(boxed))
    red = {(x, y) for x in range(280) for y in range(280) if cell.getpixel((x, y)) == (255, 0, 0)}
    # 90 x 40 pixels three times enlarged, in the middle of a cell of 280; the box is [2, 3, 12, 23]
    assert red and {x for x, _ in red} <= set(range(5 + 6, 5 + 37)) and {y for _, y in red} <= set(range(80 + 9, 80 + 70))

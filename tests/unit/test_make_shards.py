"""Published layouts -> shards: what is read, what is rejected and why, and a killed run that goes on."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from megatron_ral.commands import inspect, shards
from megatron_ral.data.index import index_path, open_index
from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts import read_record
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample, shard_entries
from tests.conftest import PROJECT
from tests.unit.shard_faults import picture, pixel_bomb
from tests.unit.test_data import loader
from tests.unit.test_video import clip, overwrite


def video_r1(number: int, **changes) -> dict:
    return {
        "problem_id": number,
        "problem": "Which digit is red?",
        "data_type": "image",
        "problem_type": "numerical",
        "options": [],
        "process": "<think>red</think>",
        "solution": "<answer>7</answer>",
        "path": "./a/red.png",
        **changes,
    }


CHAT = {
    "id": "chat-1",
    "messages": [
        {"role": "system", "content": "Look well."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a/red.png"},
                {"type": "image", "image": "wide.jpg"},
                {"type": "text", "text": "Which is wider?"},
            ],
        },
        {"role": "assistant", "content": "<think>the second</think><answer>second</answer>"},
    ],
}
V_STAR = {
    "question_id": 15,
    "image": "wide.jpg",
    "question": "What colour is it?",
    "options": ["red", "blue"],
    "label": "B",
    "bbox": [[2, 3, 10, 20]],
    "category": "direct_attributes",
}
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
    plenty = [
        video_r1(number, path=["a/red.png", "wide.jpg"] if number % 3 == 0 else "wide.jpg") for number in range(8)
    ]
    urls = [
        video_r1(50, path="pipe:cat /etc/passwd"),
        video_r1(51, path="http://host/a.png"),
        video_r1(52, path="link.png"),
    ]
    return (
        plenty
        + [CHAT, V_STAR, FRAMES, video_r1(21, data_type="video", path="v.mov"), video_r1(22, data_type="text", path=[])]
        + list(BAD.values())
        + urls
    )


def arguments(source, media, output, material, *rest) -> list[str]:
    return [
        "--input",
        str(source),
        "--media",
        str(media),
        "--output",
        str(output),
        "--model",
        str(material["tiny"]),
        "--shard-size",
        "5",
        "--workers",
        "1",
        *map(str, rest),
    ]


@pytest.fixture(scope="module")
def made(records, media, material, tmp_path_factory):
    """The records as JSONL with a line that is no UTF-8, made into shards in one go."""
    root = tmp_path_factory.mktemp("made")
    lines = [json.dumps(record).encode() for record in records] + [b'{"problem": "\xff"}']
    (root / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert shards.make(arguments(root / "train.jsonl", media, root / "out", material)) == 0
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_fields_of_the_layouts():
    chat, star = read_record(CHAT), read_record(V_STAR)
    assert chat.fields["problem"] == "Look well.\nWhich is wider?" and chat.images == ("a/red.png", "wide.jpg")
    assert (
        chat.fields["process"] == "<think>the second</think>" and chat.fields["solution"] == "<answer>second</answer>"
    )
    assert star.fields["problem"] == "What colour is it?\nOptions:\nA. red\nB. blue"
    assert star.fields["solution"] == "<answer>B</answer>" and star.fields["problem_type"] == "multiple choice"
    assert star.fields["target_boxes"] == [[2, 3, 12, 23]] and star.fields["category"] == "direct_attributes"
    assert read_record({**V_STAR, "label": "Red"}).fields["solution"] == "<answer>A</answer>"
    assert read_record({**V_STAR, "label": 1}).fields["solution"] == "<answer>B</answer>"
    lettered = read_record(video_r1(1, options=["A. 3", "B. 7"], solution="<answer>B</answer>"))
    assert lettered.fields["problem"] == "Which digit is red?\nOptions:\nA. 3\nB. 7"
    placed = read_record(
        {
            "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "7"}],
            "images": ["a.png"],
        }
    )
    assert placed.fields["problem"] == "What?" and placed.images == ("a.png",)
    assert placed.fields["solution"] == "<answer>7</answer>"


def picked(record: dict, *names: str) -> list:
    return [read_record(record).fields.get(name) for name in names]


def test_benchmarks_as_published():
    """The fields of V*, MuirBench, MVBench, ChartQA, MME and VizWiz as their files have them."""
    star = {
        "image": "direct_attributes/sa_4690.jpg",
        "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n"
        "Answer with the option's letter from the given choices directly.",
        "category": "direct_attributes",
        "label": "A",
        "question_id": "0",
    }
    assert picked(star, "problem", "solution", "problem_type", "category") == [
        star["text"],
        "<answer>A</answer>",
        "multiple choice",
        "direct_attributes",
    ]
    assert picked({"question": "Which letter is red?", "answer": "A"}, "problem_type") == [""]
    muir = {
        "idx": "7",
        "task": "Visual Retrieval",
        "question": "<image> Which is the same place?",
        "image_relation": "x",
        "options": ["<image>", "<image>", "None of them"],
        "answer": "B",
        "image_type": "photo",
        "image_list": [{"bytes": picture(), "path": None}] * 3,
    }
    assert picked(muir, "problem", "category", "problem_type") == [
        "[image 1] Which is the same place?\nOptions:\nA. [image 2]\nB. [image 3]\nC. None of them",
        "Visual Retrieval",
        "multiple choice",
    ]
    assert len(read_record(muir).images) == 3
    mvbench = {"video": "1.webm", "question": "Where does it move?", "candidates": ["Up.", "Down."], "answer": "Down."}
    assert picked(mvbench, "problem", "solution") == [
        "Where does it move?\nOptions:\nA. Up.\nB. Down.",
        "<answer>B</answer>",
    ]
    with pytest.raises(SampleError, match="about a part of its video"):
        read_record({**mvbench, "start": 1.0, "end": 3.5})
    chart = read_record({"imgname": "4.png", "query": "How many?", "label": "0.57"})
    assert chart.images == ("4.png",) and chart.fields["problem"] == "How many?"
    several = read_record({"image": "a.png", "question": "What?", "answers": [{"answer": "a cat"}, {"answer": "cat"}]})
    assert several.fields["solution"] == "<answer>a cat</answer><answer>cat</answer>"
    assert picked({"query": "How many?", "label": ["14"], "image": b"x"}, "solution") == ["<answer>14</answer>"]
    marked = {"target_frames": [{"seconds": [0, 1]}], "question_group": 12, "category": "scene", "fps": 2.0}
    for record in (video_r1(1, **marked), {**V_STAR, **marked}, {**CHAT, **marked}):
        assert picked(record, *marked) == [marked["target_frames"], "12", "scene", 2.0]


def test_questions_never_lose_their_pictures_or_options_in_silence():
    with pytest.raises(SampleError, match="field 'img' seems to name media") as refused:
        read_record({"question": "What?", "answer": "a.png", "img": "b.png"})
    assert refused.value.reason == "missing_media"
    for value in (b"x", [{"bytes": b"x", "path": None}], ["a/b.JPEG"]):
        with pytest.raises(SampleError, match="field 'image_1'"):
            read_record({"question": "What?", "answer": "7", "image_1": value})
    assert not read_record({"question": "What?", "answer": "a.png", "about": "It is cat.png, look"}).images
    assert read_record({"question": "What?", "answer": "7", "image": None, "images": ["a.png"]}).images == ("a.png",)
    for record in (
        video_r1(1, problem="<image> and <image>?"),
        {"question": "<image><image>?", "answer": "7", "image": "a"},
    ):
        with pytest.raises(SampleError, match="<image> 2 times but there are 1"):
            read_record(record)
    # options named in the question, but not by their letters, are listed
    [listed, bare] = [
        picked(video_r1(1, problem="Which is more, 3 or 7?", options=options, solution="B"), "problem")[0]
        for options in (["3", "7"], ["A.M.", "P.M."])
    ]
    assert listed.endswith("\nA. 3\nB. 7") and bare.endswith("\nA. A.M.\nB. P.M.")
    assert picked(video_r1(1, problem="Which? (A) 3 (B) 7", options=["(A) 3", "(B) 7"], solution="B"), "problem") == [
        "Which? (A) 3 (B) 7"
    ]
    thought = read_record(
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "<think>red</think>\n7"}]}
    )
    assert thought.fields["solution"] == "<answer>7</answer>" and thought.fields["process"] == "<think>red</think>"


@pytest.mark.parametrize(
    "record, said",
    [
        ({"messages": [{"role": "user", "content": 5}]}, "neither text nor a list"),
        ({"messages": [{"role": []}]}, "the role"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "has the type"),
        ({**V_STAR, "options": ["a"] * 27}, "more than there are letters"),
        ({**V_STAR, "bbox": [["a"] * 4]}, "'bbox' must be"),
        ({"question": "What?", "answer": [None]}, "must be a list of texts"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>"}]},
            "has no answer",
        ),
        ([1], "not an object"),
        ({"x": 1}, "none of the fields"),
        ({"messages": [{"role": "tool"}]}, "role 'tool'"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                ]
            },
            "more than one question",
        ),
        (
            {"messages": [{"role": "user", "content": "<image> a"}, {"role": "assistant", "content": "b"}]},
            "<image> 1 times",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type 'audio'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        (video_r1(1, path=None), "'path' names nothing"),
        (video_r1(1, path=7), "must name files"),
        ({**V_STAR, "label": 2}, "answer 2 is none of the 2"),
        ({**V_STAR, "bbox": [[1, 2]]}, "'bbox' must be"),
    ],
)
def test_records_that_no_layout_reads(record, said):
    with pytest.raises(SampleError, match=said):
        read_record(record)


# --- shards -----------------------------------------------------------------------------------------------------------


def test_good_samples_are_in_the_shards_and_bad_ones_in_the_report(made, records, material):
    shards = sorted(map(str, (made / "out").glob("*.tar")))
    assert len(shards) == -(-(len(records) + 1) // 5)
    keys = [entry["__key__"] for entry in shard_entries(shards)]
    assert keys == [str(number) for number in range(8)] + ["chat-1", "15", "20", "21", "22"]
    rejects = [json.loads(line) for line in (made / "out" / "rejects.jsonl").read_text().splitlines()]
    found = {(reject["key"], reject["reason"]) for reject in rejects}
    named = {(str(record.get("problem_id", record.get("question_id"))), reason) for reason, record in BAD.items()}
    assert found == named | {
        ("50", "refused_path"),
        ("51", "refused_path"),
        ("52", "refused_path"),
        (f"{len(records):08d}", "unreadable_text"),
    }
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
    script = (
        "import sys\n"
        "from megatron_ral.commands.shards import make\n"
        "from megatron_ral.data import shard_maker as m\n"
        "build = m.ShardMaker.build\n"
        "def stop(self, number, records):\n"
        "    if number == 2:\n"
        "        import os\n"
        "        (self.output / 'shard-000002.partial').write_bytes(b'half')\n"
        "        os._exit(9)\n"
        "    build(self, number, records)\n"
        "m.ShardMaker.build = stop\n"
        "make(sys.argv[1:])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, *arguments(made / "train.jsonl", media, output, material)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert killed.returncode == 9, killed.stderr.decode()
    assert len(list(output.glob("*.tar"))) == 2 and not (output / "dataset.json").exists()
    kept = index_path(output / "shard-000000.tar").stat().st_mtime_ns
    assert shards.make(arguments(made / "train.jsonl", media, output, material)) == 0
    assert content(output) == content(made / "out")
    assert index_path(output / "shard-000000.tar").stat().st_mtime_ns == kept, "a finished shard is not made again"
    assert shards.make(arguments(made / "train.jsonl", media, output, material)) == 0, "a finished set is left alone"
    assert shards.make(arguments(made / "train.jsonl", media, output, material, "--keys", "number")) == 2
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
    embedded = [
        {
            "problem": "What?",
            "solution": "7",
            "data_type": "image",
            "problem_id": number,
            "path": {"bytes": (media / "a/red.png").read_bytes(), "path": "red.png"},
        }
        for number in range(3)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(embedded), tmp_path / "b.parquet")
    outputs = []
    for name in ("a.json", "a.parquet", "b.parquet"):
        output = tmp_path / f"out-{name}"
        assert shards.make(arguments(tmp_path / name, media, output, material)) == 0
        outputs.append({file: data for file, data in content(output).items() if file != "dataset.json"})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 5
    [one, *_] = shard_entries([str(tmp_path / "out-b.parquet" / "shard-000000.tar")])
    assert one["png"] == embedded[0]["path"]["bytes"] and parse_sample(one).solution == "<answer>7</answer>"


def test_media_that_are_no_plain_paths_are_refused_one_by_one(media, material, tmp_path):
    """None of them ends the work, and no link leads out of the folder, also not inside a folder of frames."""
    folder = tmp_path / "media"
    (folder / "clip").mkdir(parents=True)
    (folder / "clip" / "1.png").write_bytes(picture())
    (folder / "clip" / "2.png").symlink_to(media.parent / "outside.png")
    (folder / "a.png").write_bytes(picture())
    (folder / "ring.png").symlink_to("ring.png")
    bad = [
        video_r1(1, path="ring.png"),
        video_r1(2, path="x" * 5000 + ".png"),
        video_r1(3, path="\ud800.png"),
        video_r1(4, path="clip", data_type="video"),
        video_r1(5, path="a\0.png"),
        video_r1(6, path="/etc/passwd"),
    ]
    (tmp_path / "a.json").write_text(json.dumps([*bad, video_r1(7, path="a.png")]))
    assert shards.make(arguments(tmp_path / "a.json", folder, tmp_path / "out", material)) == 0
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {(reject["key"], reject["reason"]) for reject in rejects} == {
        (str(number), "refused_path") for number in range(1, 7)
    }
    assert [entry["__key__"] for entry in shard_entries(sorted(map(str, (tmp_path / "out").glob("*.tar"))))] == ["7"]


def test_frames_are_in_the_order_of_their_numbers(material, tmp_path):
    (tmp_path / "media" / "clip").mkdir(parents=True)
    shown = [(10 * number, 0, 0) for number in range(12)]
    for number, colour in enumerate(shown):
        (tmp_path / "media" / "clip" / f"f{number}.png").write_bytes(picture(colour=colour))
    (tmp_path / "a.jsonl").write_text(json.dumps({**FRAMES, "fps": 1.0}))
    assert shards.make(arguments(tmp_path / "a.jsonl", tmp_path / "media", tmp_path / "out", material)) == 0
    [entry] = shard_entries(list(map(str, (tmp_path / "out").glob("*.tar"))))
    frames = parse_sample(entry).videos[0].pictures
    assert [Image.open(io.BytesIO(frame)).getpixel((0, 0)) for frame in frames] == shown


def test_what_the_command_line_says_of_records_that_do_not(material, media, tmp_path):
    """MME: two questions of a picture with one id."""
    records = [
        {"question_id": "pos/1.png", "image": "wide.jpg", "question": question, "answer": answer, **more}
        for question, answer, more in (("Is it red?", "No", {}), ("Is it blue?", "Yes", {"problem_type": "exact"}))
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert (
        shards.make(
            arguments(
                tmp_path / "a.json",
                media,
                tmp_path / "out",
                material,
                "--keys",
                "number",
                "--problem-type",
                "yes/no",
                "--category",
                "position",
                "--group-field",
                "question_id",
            )
        )
        == 0
    )
    samples = [parse_sample(entry) for entry in shard_entries(list(map(str, (tmp_path / "out").glob("*.tar"))))]
    assert [(sample.problem_type, sample.category, sample.question_group) for sample in samples] == [
        ("yes/no", "position", "pos/1.png"),
        ("exact", "position", "pos/1.png"),
    ]


@pytest.mark.parametrize("text, said", [("{", "is not JSON in UTF-8"), ('{"a": 1}', "must hold a list")])
def test_input_that_is_no_list_of_records(text, said, media, material, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    assert shards.make(arguments(tmp_path / "a.json", media, tmp_path / "out", material)) == 2
    assert said in capsys.readouterr().err


def test_inspection_counts_and_draws(made, capsys, tmp_path):
    assert inspect.main([str(made / "out"), "--output", str(tmp_path / "sheet.png"), "--num-samples", "13"]) == 0
    report = capsys.readouterr().out
    assert "13 samples in 6 shards" in report and "1 with target boxes" in report
    assert "numerical 10" in report and "letter 1" in report and "number 11" in report
    assert "prompt lengths: min" in report and "0 images, 1 videos 2" in report
    assert Image.open(tmp_path / "sheet.png").size == (4 * 280, 4 * (280 + 7 * 15 + 8))
    [boxed] = [
        entry for entry in shard_entries(sorted(map(str, (made / "out").glob("*.tar")))) if entry["__key__"] == "15"
    ]
    cell = inspect.draw_sample(parse_sample(boxed))
    red = {(x, y) for x in range(280) for y in range(280) if cell.getpixel((x, y)) == (255, 0, 0)}
    # 90 x 40 pixels three times enlarged, in the middle of a cell of 280; the box is [2, 3, 12, 23]
    assert (
        red and {x for x, _ in red} <= set(range(5 + 6, 5 + 37)) and {y for _, y in red} <= set(range(80 + 9, 80 + 70))
    )


def test_inspection_draws_no_bomb_and_starts_no_foreign_decoder(monkeypatch):
    opened = []
    open_image = Image.open
    monkeypatch.setattr(
        Image, "open", lambda *args, **more: opened.append(more["formats"]) or open_image(*args, **more)
    )
    for data in (
        pixel_bomb(),
        pixel_bomb(12000),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
    ):
        sample = parse_sample(
            {
                "__key__": "k",
                "__url__": "s",
                "png": data,
                "json": json.dumps({"problem": "p", "solution": "7"}).encode(),
            }
        )
        assert inspect.draw_sample(sample).getpixel((10, 200)) == (211, 211, 211), "a grey cell with the reason"
    assert opened == [("PNG", "JPEG", "WEBP")] * 4


def test_inspection_frames_the_annotated_part_of_a_video():
    record = {
        "problem": "p",
        "solution": "7",
        "fps": 1.0,
        "target_frames": [{"seconds": [5, 6], "boxes": [[8, 8, 40, 40]]}],
    }
    members = {f"frames/{number}.png": picture(64, 64, colour="black") for number in range(12)}
    cell = inspect.draw_sample(
        parse_sample({"__key__": "k", "__url__": "s", **members, "json": json.dumps(record).encode()})
    )
    assert (
        sum(count for count, (red, green, blue) in cell.getcolors(2**16) if red > 120 and green < 60 and blue < 60) > 50
    )

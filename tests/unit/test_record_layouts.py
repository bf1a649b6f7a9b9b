"""Records as other programs write them -> shards, by the tool: the right sample, or the reason and whole message."""

import json
import random
from pathlib import Path

import pytest

from megatron_ral.commands import shards
from megatron_ral.data.issues import SampleError
from megatron_ral.data.layouts import read_record
from megatron_ral.data.shards import parse_sample, shard_entries
from tests.unit.record_cases import BLUE, JPEG, READ, RED, REFUSED, USER, write_media


def make(source: Path, output: Path, material, *rest) -> int:
    fixed = ("--output", output, "--model", material["tiny"], "--shard-size", "64", "--workers", "1")
    return shards.make(list(map(str, ("--input", source, *fixed, *rest))))


def samples(output: Path) -> dict[str, dict[str, bytes]]:
    """Return key -> members of the samples of a folder of shards."""
    return {entry["__key__"]: entry for entry in shard_entries(sorted(map(str, output.glob("*.tar"))))}


def rejects(output: Path) -> dict[str, tuple[str, str]]:
    """Return key -> reason and text of the rejected records."""
    lines = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    return {line["key"]: (line["reason"], line["text"]) for line in lines}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def members(entry: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in entry.items() if not name.startswith("__") and name != "json"}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media").resolve())


@pytest.fixture(scope="module")
def made(media, material, tmp_path_factory):
    """All cases in one file, made into shards by one call of the tool."""
    root = tmp_path_factory.mktemp("cases")
    records = {name: case[0] for name, case in {**READ, **REFUSED}.items()}
    lines = [json.dumps({**record, "id": name}) for name, record in records.items()]
    (root / "cases.jsonl").write_text("\n".join(lines).replace("MEDIA", str(media)))
    assert make(root / "cases.jsonl", root / "out", material, "--media", media) == 0
    return samples(root / "out"), rejects(root / "out")


@pytest.mark.parametrize("name", READ)
def test_records_that_are_read(made, name):
    accepted, refused = made
    assert name in accepted, refused.get(name)
    record, (problem, solution), files = READ[name]
    sample = json.loads(accepted[name]["json"])
    assert (sample["problem"], sample["solution"]) == (problem, solution)
    assert members(accepted[name]) == files
    parsed = parse_sample(accepted[name])
    if any(file.startswith("frames/") for file in files):
        assert parsed.videos[0].fps == record.get("fps", 2.0)


@pytest.mark.parametrize("name", REFUSED)
def test_records_that_are_refused(made, name):
    accepted, refused = made
    assert name not in accepted, accepted[name]["json"]
    reason, text = REFUSED[name][1:]
    assert refused[name] == (reason, f"sample '{name}': {text}")


def table(records: list[dict], classes: dict[str, list[str]] | None = None):
    """Return an Arrow table, with the names of classes as `datasets` writes them."""
    import pyarrow

    names = {name: None for record in records for name in record}
    made = pyarrow.Table.from_pylist([{**names, **record} for record in records])
    features = {name: {"names": names, "_type": "ClassLabel"} for name, names in (classes or {}).items()}
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(path: Path, records: list[dict], classes: dict[str, list[str]] | None = None) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table(records, classes), path)
    return path


def save_to_disk(folder: Path, records: list[dict], classes: dict[str, list[str]] | None = None, size=4) -> Path:
    """Write records as `datasets.Dataset.save_to_disk` does: Arrow streams, dataset_info.json and state.json."""
    import pyarrow

    folder.mkdir(parents=True)
    content = table(records, classes)
    starts = range(0, len(records), size)
    names = [f"data-{number:05d}-of-{len(starts):05d}.arrow" for number in range(len(starts))]
    for name, start in zip(names, starts):
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, content.schema) as stream:
            stream.write_table(content.slice(start, size), max_chunksize=3)
    features = {name: {"names": classes, "_type": "ClassLabel"} for name, classes in (classes or {}).items()}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_format_type": None, "_split": None}))
    return folder


def embedded(number: int, data: bytes, name: str | None = None, **more) -> dict:
    return {"id": f"r{number}", "images": [{"bytes": data, "path": name}], **more}


VERL = [
    embedded(0, RED, prompt=USER, reward_model={"style": "rule", "ground_truth": "7"}, data_source="geo"),
    embedded(1, JPEG, "a/b.jpg", prompt=USER, reward_model={"style": "rule", "ground_truth": None}, solution="8"),
]
TRL = [
    embedded(2, RED, "x.png", prompt=[{"role": "user", "content": "What?"}], completion=None, solution="9"),
    embedded(3, BLUE, prompt=[{"role": "user", "content": "<image>What?"}], completion=None, solution="10"),
]
COLUMNS = [  # a column of numbers with a gap is one of floats, and every row has all columns
    {
        "id": "r4",
        "question": "How many?",
        "answer": 4.0,
        "options": None,
        "label": None,
        "image": RED,
        "messages": None,
    },
    {
        "id": "r5",
        "question": "Which?",
        "answer": None,
        "options": ["a", "b"],
        "label": 1,
        "image": BLUE,
        "messages": None,
    },
    {"id": "r6", "question": "Which?", "answer": float("nan"), "options": None, "label": None, "image": RED},
    {
        "id": "r7",
        "question": None,
        "image": RED,
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "11"}]},
        ],
    },
]
CLASSES = [
    {"id": "r8", "query": "Is it red?", "label": 1, "image": {"bytes": RED, "path": None}},
    {"id": "r9", "query": "Is it red?", "label": 0, "image": {"bytes": BLUE, "path": None}},
    {"id": "r10", "query": "Is it red?", "label": -1, "image": {"bytes": BLUE, "path": None}},
]
NAMES = {"label": ["no", "yes"]}


def test_parquet_files_of_a_folder_are_read_in_the_order_of_their_names(material, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_parquet(folder / "part-10.parquet", CLASSES, NAMES)
    write_parquet(folder / "part-2.parquet", VERL)
    write_parquet(folder / "part-3.parquet", TRL)
    write_parquet(folder / "part-9.parquet", COLUMNS)
    (folder / "README.md").write_text("not read")
    assert make(folder, tmp_path / "out", material) == 0
    found = {
        key: (json.loads(entry["json"])["solution"], *members(entry).items())
        for key, entry in samples(tmp_path / "out").items()
    }
    assert found == {
        "r0": ("<answer>7</answer>", ("png", RED)),
        "r1": ("<answer>8</answer>", ("jpg", JPEG)),
        "r2": ("<answer>9</answer>", ("png", RED)),
        "r3": ("<answer>10</answer>", ("png", BLUE)),
        "r4": ("<answer>4</answer>", ("png", RED)),
        "r5": ("<answer>B</answer>", ("png", BLUE)),
        "r7": ("<answer>11</answer>", ("png", RED)),
        "r8": ("<answer>yes</answer>", ("png", RED)),
        "r9": ("<answer>no</answer>", ("png", BLUE)),
    }
    assert list(found) == sorted(found, key=lambda key: int(key[1:])), "part-2 comes before part-10"
    missing = {key: ("missing_field", f"sample '{key}': no field 'answer'") for key in ("r6", "r10")}
    assert rejects(tmp_path / "out") == missing


def test_numbers_and_classes_of_columns_are_what_was_written(material, tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {
        "question": ["How long?"] * 3,
        "answer": pyarrow.array([0.1, 3.0, None], pyarrow.float32()),
        "answers": [None, None, [0, 2]],
    }
    features = {"answers": {"feature": {"names": ["cat", "dog", "cow"], "_type": "ClassLabel"}, "_type": "List"}}
    written = pyarrow.table(columns)
    written = written.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(written, tmp_path / "a.parquet")
    assert make(tmp_path / "a.parquet", tmp_path / "out", material) == 0
    assert [json.loads(entry["json"])["solution"] for entry in samples(tmp_path / "out").values()] == [
        "<answer>0.1</answer>",
        "<answer>3</answer>",
        "<answer>cat</answer><answer>cow</answer>",
    ]


def test_the_mark_of_utf_8_at_the_begin_of_a_file_is_no_content(material, tmp_path):
    record = json.dumps({"id": "a", "question": "What?", "answer": "7"})
    for name, text in (("a.jsonl", record), ("b.json", f"[{record}]")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert make(tmp_path / name, tmp_path / f"out-{name}", material) == 0
        assert list(samples(tmp_path / f"out-{name}")) == ["a"]


def test_a_thought_beside_the_reply_is_the_process():
    turn = {"role": "assistant", "reasoning_content": "3 and 4", "content": "7"}
    fields = read_record({"messages": [*USER, turn], "tools": "[]"}).fields
    again = {**turn, "content": "<think>3 and 4</think>7"}  # some write it in both places
    assert fields == read_record({"messages": [*USER, again]}).fields
    assert (fields["process"], fields["solution"]) == ("<think>3 and 4</think>", "<answer>7</answer>")


def test_a_saved_hugging_face_data_set_gives_the_shards_of_its_records(material, tmp_path):
    records = [{**record, "label": number % 2} for number, record in enumerate(CLASSES * 3)]
    records = [{**record, "id": f"r{number}"} for number, record in enumerate(records)]
    whole = save_to_disk(tmp_path / "whole", records, NAMES)
    split = save_to_disk(tmp_path / "dict" / "train", records, NAMES).parent
    (split / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    write_parquet(tmp_path / "a.parquet", records, NAMES)
    fixed = ["--model", material["tiny"], "--workers", 1, "--shard-size", 4]
    outputs = []
    for number, source in enumerate(
        (
            ["--hf-dataset", whole],
            ["--hf-dataset", split, "--split", "train"],
            ["--hf-dataset", split / "train"],
            ["--input", tmp_path / "a.parquet"],
        )
    ):
        output = tmp_path / f"out-{number}"
        assert shards.make(list(map(str, [*source, *fixed, "--output", output]))) == 0
        outputs.append({name: data for name, data in content(output).items() if name != "dataset.json"})
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    solutions = [json.loads(entry["json"])["solution"] for entry in samples(tmp_path / "out-0").values()]
    assert solutions == ["<answer>no</answer>", "<answer>yes</answer>"] * 4 + ["<answer>no</answer>"]


def test_a_path_without_a_media_folder_is_refused(material, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"question": "What?", "answer": "7", "image": "red.png"}]))
    assert make(tmp_path / "a.json", tmp_path / "out", material) == 0
    text = "sample '00000000': 'red.png' is a path; give the folder that it is in as --media"
    assert rejects(tmp_path / "out") == {"00000000": ("refused_path", text)}


@pytest.mark.parametrize(
    "options, said",
    [
        (["--hf-dataset", "DIR/dict"], "--split is none of the splits of DIR/dict: train, test"),
        (
            ["--hf-dataset", "DIR/dict", "--split", "dev"],
            "--split = dev is none of the splits of DIR/dict: train, test",
        ),
        (["--hf-dataset", "DIR/one", "--split", "dev"], "DIR/one is one data set without splits; leave it out"),
        (["--hf-dataset", "DIR/nowhere"], "holds no state.json; give a folder that save_to_disk wrote"),
        (["--hf-dataset", "DIR/lost"], "names 'a.arrow' in state.json, which is no file in it; copy it again"),
        (["--hf-dataset", "DIR/chosen"], "holds chosen rows as indices; save it again with a newer `datasets`"),
        (["--hf-dataset", "DIR/torn"], "is not JSON in UTF-8"),
        (["--hf-dataset", "DIR/broken"], "DIR/broken/b.arrow' cannot be read as an Arrow stream ("),
        (
            ["--input", "DIR/broken.parquet"],
            "--input = 'DIR/broken.parquet' cannot be read as parquet (Parquet magic bytes",
        ),
        (["--input", "DIR/hub"], "holds files of several splits (test, train); give one file, or a folder with those"),
        (["--input", "DIR/lines.json"], "; a file with one record per line must be named .jsonl"),
        (["--input", "DIR/nowhere.json"], "DIR/nowhere.json does not exist"),
        (["--input", "DIR/one"], "is a saved Hugging Face data set; give it as --hf-dataset"),
        (["--input", "DIR/empty"], "holds no file of .json, .jsonl, .parquet"),
        (["--input", "DIR/a.csv"], "DIR/a.csv is not a .json, .jsonl or .parquet file"),
        (["--input", "DIR/a.json", "--split", "dev"], "--split = dev is a split of --hf-dataset, which is not given"),
        ([], "one of the arguments --input --hf-dataset is required"),
        (["--input", "DIR/a.json", "--hf-dataset", "DIR/one"], "not allowed with argument"),
    ],
)
def test_sources_that_are_none(options, said, material, tmp_path, capsys):
    save_to_disk(tmp_path / "one", CLASSES)
    save_to_disk(tmp_path / "dict" / "train", CLASSES)
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for name, state in (
        ("lost", {"_data_files": [{"filename": "a.arrow"}]}),
        ("chosen", {"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}),
        ("broken", {"_data_files": [{"filename": "b.arrow"}]}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(json.dumps(state))
    (tmp_path / "broken" / "b.arrow").write_bytes(b"no Arrow stream")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "state.json").write_text("{")
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "hub").mkdir()
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        write_parquet(tmp_path / "hub" / name, VERL)
    (tmp_path / "lines.json").write_text("{}\n{}")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet file")
    (tmp_path / "a.csv").write_text("a,b")
    fixed = ["--output", tmp_path / "out", "--model", material["tiny"], "--workers", "1"]
    status: object
    try:
        status = shards.make([str(part).replace("DIR", str(tmp_path)) for part in (*options, *fixed)])
    except SystemExit as end:  # argparse
        status = end.code
    assert status == 2
    assert said.replace("DIR", str(tmp_path)) in " ".join(capsys.readouterr().err.split())


JUNK = [
    None,
    "",
    "a",
    "x.png",
    "<image>",
    b"x",
    0,
    -1,
    7.5,
    float("inf"),
    10**400,
    True,
    [],
    [None],
    [1],
    ["a"],
    {},
    {"a": 1},
]
JUNK += [
    [[]],
    [{}],
    [["x.png"]],
    {"bytes": None},
    {"url": 5},
    {"type": "image"},
    [{"role": "user"}],
    "\ud800",
    "data:",
    "[{",
]


def mutated(value, choose: random.Random):
    """Return a value with one of its parts replaced, removed or put in another place."""
    if isinstance(value, dict) and value and choose.random() < 0.8:
        name = choose.choice(sorted(value))
        other = choose.choice(("fps", "image", "videos", "options", "answer", "label", "messages", "prompt", name))
        return {**value, other: mutated(value[name], choose)}
    if isinstance(value, list) and value and choose.random() < 0.8:
        place = choose.randrange(len(value))
        return [*value[:place], mutated(value[place], choose), *value[place + choose.randrange(2) :]]
    return choose.choice(JUNK)


def test_whatever_a_record_holds_its_fault_is_one_sentence():
    choose = random.Random(0)
    records = [case[0] for case in (*READ.values(), *REFUSED.values())]
    said = set()
    for _ in range(6000):
        record = mutated(choose.choice(records), choose)
        for _ in range(choose.randrange(3)):
            record = mutated(record, choose)
        try:
            read_record(record)
        except SampleError as error:
            said.add(str(error))
            assert error.reason != "unusable" and "\n" not in str(error) and len(str(error)) < 600, record
    assert len(said) > 100


# --- a mixed folder ---------------------------------------------------------------------------------------------------

NUM_RECORDS = 300
GOOD = {name: case for name, case in READ.items() if "MEDIA" not in json.dumps(case[0])}


def mixed_records() -> list[tuple[dict, str]]:
    """Return 300 records in turn of all layouts, each with its own question, and the reason of refusal or ""."""
    good, bad = list(GOOD.items()), list(REFUSED.items())
    records = []
    for number in range(NUM_RECORDS):
        refused = number % 5 == 4
        case = bad[number // 5 % len(bad)][1] if refused else good[(number - number // 5) % len(good)][1]
        record = json.loads(json.dumps(case[0]).replace("What?", f"What is number {number}?"))
        records.append(({**record, "id": f"m{number}"}, case[1] if refused else ""))
    return records


def test_a_mixed_folder_of_300_records_is_accepted_rejected_by_reason_and_the_same_again(media, material, tmp_path):
    records = mixed_records()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "1.jsonl").write_text("\n".join(json.dumps(record) for record, _ in records[:150]))
    (folder / "2.json").write_text(json.dumps([record for record, _ in records[150:]]))
    pictures = [{**record, "id": f"p{number}"} for number, record in enumerate((*VERL, *TRL))]
    write_parquet(folder / "3.parquet", pictures[:2])
    write_parquet(folder / "4.parquet", pictures[2:])
    for output in ("one", "two"):
        assert make(folder, tmp_path / output, material, "--media", media) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    wanted = {record["id"]: reason for record, reason in records} | {record["id"]: "" for record in pictures}
    accepted, refused = samples(tmp_path / "one"), rejects(tmp_path / "one")
    assert {**dict.fromkeys(accepted, ""), **{key: reason for key, (reason, _) in refused.items()}} == wanted
    assert len(accepted) == 244 and len(refused) == 60
    summary = json.loads((tmp_path / "one" / "dataset.json").read_text())
    assert summary["num_samples"] == 244 and sum(summary["rejects"].values()) == 60
    assert summary["rejects"] == {
        reason: sum(found == reason for found, _ in refused.values()) for reason in summary["rejects"]
    }
    numbered = [key for key, entry in accepted.items() if f"number {key[1:]}?" in json.loads(entry["json"])["problem"]]
    assert len(numbered) > 180, "each sample has its own question"
    assert all(parse_sample(entry).key == key for key, entry in accepted.items())

"""Records as other programs write them -> shards, by the tool: the right sample, or the reason and whole message."""

import json
from pathlib import Path

import pytest

from megatron_ral.commands import shards
from megatron_ral.data.shards import parse_sample, shard_entries
from tests.unit.record_cases import READ, REFUSED, write_media


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

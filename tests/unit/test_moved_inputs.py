"""A run resumes with its model folder and shards in another place, and with no other files than it was started with."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from megatron_ral.config import RunConfig
from megatron_ral.config.sections import DataConfig, ModelConfig, SourceConfig
from megatron_ral.errors import CheckpointError
from megatron_ral.training.checkpoint.inputs import input_files
from megatron_ral.training.checkpoint.settings import CheckpointSettings, check_settings

BIG = 200_000
"""Bytes of a file of which only samples are read."""


def settings_for(root: Path, model: str = "model", data: str = "data") -> CheckpointSettings:
    sources = tuple(SourceConfig(f"{root}/{data}/{name}/*.tar", num) for name, num in (("easy", 8), ("hard", 0)))
    return CheckpointSettings.from_config(
        RunConfig(
            model=ModelConfig(path=f"{root}/{model}", reference_path=f"{root}/{model}"),
            data=DataConfig(train=sources),
        )
    )


@pytest.fixture
def made(tmp_path) -> Path:
    """A model folder, two sources of shards with equal names, and a checkpoint that lists them."""
    for name in ("easy", "hard"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "data" / name / f"shard-{number}.tar").write_bytes(bytes(1000 + number))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(BIG))
    for name in ("config.json", "tokenizer.json", "README.md", "generation_config.json"):
        (tmp_path / "model" / name).write_text(f'"{name}"')
    settings = settings_for(tmp_path)
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "config.yaml").write_text(settings.config_text)
    (tmp_path / "step" / "inputs.json").write_text(json.dumps(input_files(settings.values)))
    return tmp_path


@pytest.mark.parametrize(
    "move",
    [
        {},
        {"model": "elsewhere"},
        {"data": "disk/other"},
        {"model": "disk/model", "data": "disk/data"},
    ],
    ids=["nothing moved", "model", "data", "both"],
)
def test_the_same_files_in_another_place_are_the_same_run(made, move):
    for old, new in move.items():
        (made / new).parent.mkdir(exist_ok=True)
        shutil.move(made / old, made / new)
    check_settings(settings_for(made, **move), made / "step")


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "note.md", "._config.json"])
def test_files_that_no_run_reads_may_change(made, name):
    (made / "model" / name).write_text("other words")
    check_settings(settings_for(made), made / "step")


def overwrite(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda root: (root / "data/hard/shard-1.tar").write_bytes(bytes(900)),
            "data.train.1.shards = '{root}/{data}/hard/*.tar': file 'shard-1.tar' has 900 bytes, unlike",
        ),
        (
            lambda root: (root / "data/easy/shard-0.tar").unlink(),
            "data.train.0.shards = '{root}/{data}/easy/*.tar': file 'shard-0.tar' is missing there, unlike",
        ),
        (
            lambda root: (root / "data/easy/shard-2.tar").write_bytes(bytes(9)),
            "data.train.0.shards = '{root}/{data}/easy/*.tar': file 'shard-2.tar' is new there, unlike",
        ),
        (
            lambda root: (root / "data/easy/shard-0.tar").rename(root / "data/easy/first.tar"),
            "data.train.0.shards = '{root}/{data}/easy/*.tar': file 'first.tar' is new there, unlike",
        ),
        (
            lambda root: overwrite(root / "model/model.safetensors", BIG - 1),
            "model.path = {root}/{model}: file 'model.safetensors' has other contents, unlike",
        ),
        (
            lambda root: (root / "model/model.safetensors").write_bytes(b"1" * BIG),
            "model.path = {root}/{model}: file 'model.safetensors' has other contents, unlike",
        ),
        (
            lambda root: (root / "model/config.json").write_text('"CONFIG.json"'),
            "model.path = {root}/{model}: file 'config.json' has other contents, unlike",
        ),
        (
            lambda root: (root / "model/tokenizer.json").unlink(),
            "model.path = {root}/{model}: file 'tokenizer.json' is missing there, unlike",
        ),
        (
            lambda root: (root / "model/chat_template.jinja").write_text("new"),
            "model.path = {root}/{model}: file 'chat_template.jinja' is new there, unlike",
        ),
    ],
)
def test_a_changed_file_is_named(made, change, message, moved):
    change(made)
    names = {"model": "other_model", "data": "other_data"} if moved else {"model": "model", "data": "data"}
    if moved:
        for old, new in names.items():
            shutil.move(made / old, made / new)
    with pytest.raises(CheckpointError) as caught:
        check_settings(settings_for(made, **names), made / "step")
    rest = f" when checkpoint '{made}/step' was made; give the same files, or start in another train.output_dir"
    assert str(caught.value).replace("'", "") == (message.format(root=made, **names) + rest).replace("'", "")


def test_other_settings_of_a_moved_source_are_still_refused(made):
    shutil.move(made / "data", made / "moved")
    settings = settings_for(made, data="moved")
    sources = [{**source, "num_samples": 4} for source in settings.values["data.train"][:1]]
    other = {**settings.values, "data.train": sources + settings.values["data.train"][1:]}
    with pytest.raises(CheckpointError, match="data.train = .*'num_samples': 4.*was made with .*'num_samples': 8"):
        check_settings(dataclasses.replace(settings, values=other), made / "step")


def test_a_checkpoint_without_a_list_says_how_to_go_on(made):
    (made / "step" / "inputs.json").unlink()
    check_settings(settings_for(made), made / "step")
    shutil.move(made / "model", made / "moved")
    with pytest.raises(CheckpointError) as caught:
        check_settings(settings_for(made, model="moved"), made / "step")
    assert str(caught.value).replace("'", "") == (
        f"model.path = {made}/moved but checkpoint {made}/step was made with {made}/model; resume with the same "
        "setting (it is of a version that listed no files; where they moved, put a link at the old path), or start "
        "in another train.output_dir"
    )

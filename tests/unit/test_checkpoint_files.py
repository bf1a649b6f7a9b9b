"""Folders of checkpoints: which are whole, which are removed; settings that a resumed run may change."""

import dataclasses
import json
import logging

import pytest
import yaml

from megatron_ral.errors import CheckpointError
from megatron_ral.models.shape import read_shape
from megatron_ral.training.checkpoint.files import (
    MANIFEST,
    Manifest,
    begin_folder,
    checkpoint_root,
    finish_folder,
    newest_checkpoint,
    parameter_tables,
    read_manifest,
    whole_checkpoints,
    write_synced,
)
from megatron_ral.training.checkpoint.settings import CheckpointSettings, check_settings, read_saved_config
from tests.distributed.cases import make_config


def save(output, step: int, keep: int = 9):
    root = checkpoint_root(str(output))
    begin_folder(root, step)
    partial = root / f"step_{step:08d}.partial"
    files = {
        name: write_synced(partial / name, "x" * (100 + step)) for name in ("rank_00000.safetensors", "config.yaml")
    }
    return finish_folder(root, Manifest(step, 1, 1, 1, [], files), keep)


def names(output) -> list[str]:
    return sorted(path.name for path in checkpoint_root(str(output)).iterdir())


def cut_short(folder):
    (folder / "rank_00000.safetensors").write_bytes(b"x" * 99)


def remove_file(folder):
    (folder / "config.yaml").unlink()


def remove_manifest(folder):
    (folder / MANIFEST).unlink()


def half_a_manifest(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def unnamed(folder):
    folder.rename(folder.with_name(folder.name + ".partial"))


@pytest.mark.parametrize(
    "harm, said",
    [
        (cut_short, "step_00000003' is passed over: file 'rank_00000.safetensors' has 99 bytes instead of 103"),
        (remove_file, "step_00000003' is passed over: file 'config.yaml' is missing"),
        (remove_manifest, "step_00000003' is passed over: its save was cut off before manifest.json"),
        (half_a_manifest, "step_00000003' is passed over: manifest.json is not readable"),
        (unnamed, "step_00000003.partial' is passed over: its save was cut off"),
    ],
)
def test_damaged_folders_are_passed_over(tmp_path, caplog, harm, said):
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    assert newest_checkpoint(str(tmp_path), warn=True) == third and not caplog.records
    cut_short(first)  # older than the one that is resumed from, so no warning
    harm(third)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(str(tmp_path), warn=True) == second
    assert [said in record.getMessage() for record in caplog.records] == [True]
    assert whole_checkpoints(str(tmp_path)) == [second]
    remove_manifest(second)
    assert newest_checkpoint(str(tmp_path)) is None
    # the same step again takes its place
    again = save(tmp_path, 3)
    assert newest_checkpoint(str(tmp_path)) == again and names(tmp_path) == [
        "latest",
        "step_00000001",
        "step_00000002",
        "step_00000003",
    ]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda manifest: manifest.pop("version"), "has version 1 of the format, this program reads version 2"),
        (lambda manifest: manifest.update(version=3), "has version 3 of the format"),
        (lambda manifest: manifest.update(format="other"), "was not written by this program"),
        (lambda manifest: manifest.pop("files"), "was not written by this program"),
        (lambda manifest: manifest.pop("world_size"), "has no 'world_size'"),
    ],
)
def test_other_formats_are_an_error_and_not_passed_over(tmp_path, change, said):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=said):
        newest_checkpoint(str(tmp_path))
    newest = save(tmp_path, 3)
    assert newest_checkpoint(str(tmp_path)) == newest
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(CheckpointError, match="was not written by this program"):
        read_manifest(folder)


def test_old_ones_and_leftovers_go_and_damaged_ones_do_not_count(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=9)
    root = checkpoint_root(str(tmp_path))
    remove_manifest(root / "step_00000001"), remove_manifest(root / "step_00000003")
    begin_folder(root, 7)
    assert "step_00000007.partial" in names(tmp_path)
    save(tmp_path, 5, keep=2)  # 4 and 5 stay: 3 is damaged and older than what is kept
    assert names(tmp_path) == ["latest", "step_00000004", "step_00000005"]
    assert (root / "latest").resolve().name == "step_00000005"
    remove_manifest(root / "step_00000005")
    save(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["latest", "step_00000004", "step_00000005", "step_00000006"]


def test_an_old_one_that_cannot_be_removed_ends_no_run(tmp_path, caplog, monkeypatch):
    save(tmp_path, 1)

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr("megatron_ral.training.checkpoint.files.shutil.rmtree", busy)
    (checkpoint_root(str(tmp_path)) / "step_00000000.partial").mkdir()
    save(tmp_path, 2, keep=1)
    assert newest_checkpoint(str(tmp_path)).name == "step_00000002"
    assert caplog.text.count("could not be removed ([Errno 39] Directory not empty)") == 2
    monkeypatch.undo()
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["latest", "step_00000003"]


def test_manifest_is_checked_against_the_model(material, tmp_path):
    shape = read_shape(str(material["tiny"]))
    tables = parameter_tables(shape, 2, 2, False)
    manifest = Manifest(1, 4, 2, 2, tables, {})
    manifest.check_model(tmp_path, shape, False)
    assert [len(stage) for stage in tables] == [1 + 2 * 7, 2 * 7 + 2] and json.loads(manifest.text())[
        "parameters"
    ] == tables
    fc1 = tables[0]["language.decoder.layers.0.mlp.linear_fc1.weight"]
    assert fc1 == {"shape": [shape.ffn_hidden_size, shape.hidden_size], "cut_dim": 0, "blocks": 2}
    with pytest.raises(
        CheckpointError, match="'language.decoder.layers.0.mlp.linear_fc1.weight' of stage 0.*another model"
    ):
        manifest.check_model(tmp_path, dataclasses.replace(shape, ffn_hidden_size=shape.ffn_hidden_size // 2), False)
    with pytest.raises(CheckpointError, match="parameter 'visual.*as None"):
        manifest.check_model(tmp_path, shape, True)


def saved_settings(tmp_path, change=None, **sections) -> tuple[CheckpointSettings, object]:
    """Settings of a run, and a folder with the configuration that they are saved as after `change`."""
    settings = CheckpointSettings.from_config(dataclasses.replace(make_config("m"), **sections))
    tree = yaml.safe_load(settings.config_text)
    if change is not None:
        change(tree)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return settings, tmp_path


def test_settings_are_saved_and_read_back(tmp_path):
    settings, folder = saved_settings(tmp_path, seed=3)
    check_settings(settings, folder)
    assert read_saved_config(folder) == dataclasses.replace(make_config("m"), seed=3)
    assert settings.values["seed"] == 3 and settings.output_dir == make_config("m").train.output_dir


@pytest.mark.parametrize(
    "change, key, said",
    [
        (lambda tree: tree.update(seed=9), "seed", "seed = 3 but checkpoint"),
        (lambda tree: tree["data"]["train"][0].update(shards="x"), "data.train", "'shards': 'x'"),
        (
            lambda tree: tree["data"]["train"].insert(0, {"shards": "x", "num_samples": 1}),
            "data.train",
            "",
        ),
        (
            lambda tree: tree["reward"]["functions"].update(f={"path": "a:b", "weight": 1.0}),
            "reward.functions.f.path",
            "= nothing but",
        ),
    ],
)
def test_other_settings_are_refused_by_their_key(tmp_path, change, key, said):
    settings, folder = saved_settings(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        check_settings(settings, folder)
    assert caught.value.key == key and said in str(caught.value)


def test_settings_of_an_earlier_version(tmp_path):
    """A retired setting is dropped, a new one gets its default, an unknown one is refused."""
    settings, folder = saved_settings(tmp_path, lambda tree: tree["loss"].update(attention_ema_decay=0.99))
    check_settings(settings, folder)
    settings, folder = saved_settings(tmp_path, lambda tree: tree["loss"].pop("kl_clamp"))
    check_settings(settings, folder)
    for change in (
        lambda tree: tree["loss"].update(attention_target="average of all"),
        lambda tree: tree["loss"].update(unheard_of=1),
    ):
        settings, folder = saved_settings(tmp_path, change)
        with pytest.raises(CheckpointError, match="settings that this version cannot use .*that wrote it"):
            check_settings(settings, folder)

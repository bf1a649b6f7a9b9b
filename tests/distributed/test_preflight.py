"""Real processes that meet before a run: one has other settings, lacks a shard, cannot write, runs another version."""

import os
import time
from pathlib import Path

import pytest

from megatron_ral.config import load_config
from megatron_ral.models.shape import read_shape
from tests.distributed.runner import run_ranks
from tests.integration.cases import RL, write_config


def meet(path, overrides, changed) -> tuple[str, str]:
    """(what was said on this rank, how it ended); `changed`: rank -> overrides of it alone, `rank` in what its folder is."""
    from megatron_ral.errors import DataError
    from megatron_ral.planning import preflight
    from megatron_ral.training.trainer import Inputs

    rank, said, problems = os.environ["RANK"], [], []
    own = changed.get(int(rank), {})
    config = load_config(path, [*overrides, *own.get("overrides", ())])
    if "version" in own:  # another checkout: its sources are other ones
        preflight.source_digest = lambda folder: own["version"]
    if "clock" in own:
        real = time.time
        preflight.time.time = lambda: real() + own["clock"]
    if "late" in own:
        appears = preflight._appears
        preflight._appears = lambda path: time.sleep(own["late"]) or appears(path, 1.0)
    if "node" in own:
        os.environ.update(LOCAL_RANK="0", GROUP_RANK=str(own["node"]))
    if "slow" in own:
        looks = preflight._unreachable
        preflight._unreachable = lambda ports: time.sleep(own["slow"]) or looks(ports)
    if "host" in own:
        preflight.socket.gethostname = lambda: own["host"]
    try:
        Inputs.open(config, False)
    except DataError as error:
        problems.append(error)
    try:
        end = preflight.check_launch(
            config, read_shape(config.model.path), None, problems, {"--resume": False}, said.append
        )
    except preflight.PreflightError as error:
        end = str(error)
    return "\n".join(said), end


def meet_and_part() -> bool:
    """Whether the first rank still listens where the process groups will meet next."""
    import gc
    import socket

    from megatron_ral.runtime.rendezvous import Rendezvous

    meeting = Rendezvous(30.0)
    meeting.announce("word", 1)
    meeting.gather("heard", None)
    del meeting
    gc.collect()
    with socket.socket() as client:
        return client.connect_ex((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))) == 0


def test_port_stays_open_after_the_meeting():
    """Else a rank that is early at the next meeting is reset, where no launcher's agent holds the store."""
    assert run_ranks(1, meet_and_part) == [False], "a lone rank meets itself"
    assert run_ranks(2, meet_and_part)[0]


@pytest.fixture
def run(material, tmp_path):
    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    return path, [*overrides, f"train.output_dir={tmp_path}/run/deep"], tmp_path


def rows(text: str) -> list[str]:
    return text.splitlines()[2:]


def test_all_is_well(run):
    path, overrides, folder = run
    results = run_ranks(3, meet, path, overrides, {})
    assert all(said == "" and end.startswith("preflight: 3 ranks agree") for said, end in results)
    assert os.listdir(folder / "run/deep") == []


def test_a_slow_node_still_finds_the_ports_of_the_others_open(run):
    path, overrides, _ = run
    results = run_ranks(
        3, meet, path, overrides, {rank: {"node": rank, "slow": 1.0 * (rank != 2)} for rank in range(3)}
    )
    assert all(said == "" and end.startswith("preflight: 3 ranks agree") for said, end in results), results


def test_the_file_of_another_writer_stays_until_all_have_looked(run):
    """The first rank cannot write; the second, which can, does not wait for it or for the slow third to look."""
    path, overrides, folder = run
    (folder / "a_file").touch()
    results = run_ranks(
        3, meet, path, overrides, {0: {"overrides": [f"train.output_dir={folder}/a_file/run"]}, 2: {"late": 1.0}}
    )
    said = results[0][0]
    assert "cannot be written to" in said and "a_file" in said
    assert not any(row.startswith("rank 2 (") for row in rows(said)), said


def test_other_settings_on_one_rank_are_one_sentence(run):
    path, overrides, folder = run
    results = run_ranks(3, meet, path, overrides, {1: {"overrides": ["loss.kl_coef=0.1"]}})
    (said, end), *others = results
    assert said == end == others[0][1] == others[1][1] and others[0][0] == others[1][0] == ""
    for part in ("rank 1 (", "loss.kl_coef = 0.1", "rank 0, 0.04", "same settings"):
        assert part in said, said
    assert "\n" not in said and not (folder / "run").exists(), "nothing is left behind"


def test_everything_that_is_wrong_comes_at_once(run, material):
    path, overrides, folder = run
    other = folder / "elsewhere"
    other.mkdir()
    for shard in sorted(Path(material["data"]).glob("rl-*"))[1:]:
        (other / shard.name).write_bytes(shard.read_bytes())
    here = f"data.train=[{{shards: '{folder}/shards/rl-*.tar'}}]"
    (folder / "shards").symlink_to(material["data"])
    results = run_ranks(
        4,
        meet,
        path,
        [*overrides, here],
        {
            1: {"overrides": ["loss.kl_coef=0.1", f"data.train=[{{shards: '{folder}/nothing/rl-*.tar'}}]"]},
            2: {"overrides": [f"data.train=[{{shards: '{other}/rl-*.tar'}}]"], "version": "0123456789ab"},
            3: {"overrides": [f"train.output_dir={path}/below_a_file"], "clock": 120.0},
        },
    )
    said = results[0][0]
    lines = rows(said)
    assert said.splitlines()[0] == f"{len(lines)} things are wrong; nothing was started", said
    for wanted in (
        ("rank 1 (", "loss.kl_coef", "0.1", "0.04"),
        ("rank 1 (", "data.train", "nothing/rl-*.tar", "matches no file"),
        ("rank 2 (", "data.train.0.shards", "7 files", "8 files"),
        ("rank 2 (", "megatron_ral", "0123456789ab"),
        ("rank 3 (", "train.output_dir", "below_a_file", "cannot be written to"),
        ("rank 3 (", "clock", "+120 s"),
    ):
        assert any(all(part in line for part in wanted) for line in lines), (wanted, said)
    assert not any("rank 0 (" in line or "all ranks" in line for line in lines), said


def test_folder_of_the_same_name_on_another_disk(run):
    """A rank whose path leads elsewhere, as where a node has not mounted the shared disk."""
    path, overrides, folder = run
    results = run_ranks(2, meet_in_own_folder, path, overrides[:-1], str(folder))
    assert "rank 1 (" in results[0][0] and "train.output_dir" in results[0][0], results
    assert "is another folder than on rank 0" in results[0][0], results


def meet_in_own_folder(path, overrides, folder):
    own = Path(folder) / f"node{os.environ['RANK']}"
    own.mkdir()
    os.chdir(own)
    return meet(path, [*overrides, "train.output_dir=run"], {})


def test_weights_that_do_not_fit_their_config(run, material, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    path, overrides, _ = run
    broken = tmp_path / "broken"
    shutil.copytree(material["tiny"], broken)
    [file] = broken.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    [(said, _)] = run_ranks(1, meet, path, [*overrides, f"model.path={broken}"], {})
    assert "model.path" in said and "mis-shaped" in said and str(broken) in said, said


def test_disk_that_is_too_small(material):
    from megatron_ral.planning.disk import checkpoint_bytes, disk_problem, needed_bytes

    shape = read_shape(material["tiny"])
    config = load_config(
        "pretrained_configs/runs/ral_tiny.yaml", [f"model.path={material['tiny']}", "train.output_dir=/nonexistent"]
    )
    from safetensors import safe_open

    [file] = Path(material["tiny"]).glob("*.safetensors")
    with safe_open(str(file), "pt") as handle:
        sizes = {name: handle.get_tensor(name).numel() for name in handle.keys()}
    trained = sum(size for name, size in sizes.items() if "visual" not in name)
    assert checkpoint_bytes(config, shape) == 12 * trained
    assert needed_bytes(config, shape) == 3 * 12 * trained + 4 * sum(sizes.values())
    assert disk_problem(config, shape, needed_bytes(config, shape)) is None
    assert "train.output_dir" in str(disk_problem(config, shape, needed_bytes(config, shape) - 1))

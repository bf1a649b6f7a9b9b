"""Preflight of real processes: one has other settings, lacks a shard, cannot write, or runs another version."""

import os
import time
from pathlib import Path

import pytest

from megatron_ral.config import load_config
from megatron_ral.models.shape import read_shape
from tests.distributed.runner import run_ranks
from tests.integration.cases import RL, write_config


def check(path, overrides, changed) -> tuple[str, str]:
    """Return (text printed on this rank, its end). `changed` holds what is different on a rank, by rank."""
    from megatron_ral.errors import DataError, UserError
    from megatron_ral.planning import launch_facts, preflight
    from megatron_ral.training.trainer import Inputs

    rank, said, problems = os.environ["RANK"], [], []
    own = changed.get(int(rank), {})
    config = load_config(path, [*overrides, *own.get("overrides", ())])
    if "version" in own:  # another checkout has other sources
        launch_facts.source_digest = lambda folder: own["version"]
    if "clock" in own:
        real = time.time
        preflight.time.time = lambda: real() + own["clock"]
    if "late" in own:
        appears = launch_facts.appears
        launch_facts.appears = lambda path: time.sleep(own["late"]) or appears(path, 1.0)
    if "node" in own:
        os.environ.update(LOCAL_RANK="0", GROUP_RANK=str(own["node"]))
    if "slow" in own:
        unreachable = launch_facts.unreachable_ports
        launch_facts.unreachable_ports = lambda ports: time.sleep(own["slow"]) or unreachable(ports)
    if "host" in own:
        preflight.socket.gethostname = lambda: own["host"]
    try:
        Inputs.open(config, False)
    except DataError as error:
        problems.append(error)
    try:
        end = preflight.check_launch(
            launch_facts.LaunchSettings.from_config(config),
            read_shape(config.model.path),
            None,
            problems,
            {"--resume": False},
            said.append,
        )
    except UserError as error:
        end = str(error)
    return "\n".join(said), end


def port_after_rendezvous() -> bool:
    """Return whether the first rank still listens at the port that the process groups will use."""
    import gc
    import socket

    from megatron_ral.runtime.rendezvous import Rendezvous

    rendezvous = Rendezvous(30.0)
    rendezvous.announce("word", 1)
    rendezvous.gather("heard", None)
    del rendezvous
    gc.collect()
    with socket.socket() as client:
        return client.connect_ex((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))) == 0


def test_port_stays_open_after_the_rendezvous():
    """A closed port would reset a rank that connects early to the process groups, if no launcher's agent hosts it."""
    assert run_ranks(1, port_after_rendezvous) == [False], "a single rank needs no store"
    assert run_ranks(2, port_after_rendezvous)[0]


@pytest.fixture
def run(material, tmp_path):
    path, overrides = write_config(tmp_path, RL, material["tiny"], material["data"], "rl")
    return path, [*overrides, f"train.output_dir={tmp_path}/run/deep"], tmp_path


def rows(text: str) -> list[str]:
    return text.splitlines()[2:]


def test_ranks_that_agree_leave_no_file(run):
    path, overrides, folder = run
    results = run_ranks(3, check, path, overrides, {})
    assert all(said == "" and end.startswith("preflight: 3 ranks agree") for said, end in results)
    assert os.listdir(folder / "run/deep") == []


def test_a_slow_node_still_finds_the_ports_of_the_others_open(run):
    path, overrides, _ = run
    results = run_ranks(
        3, check, path, overrides, {rank: {"node": rank, "slow": 1.0 * (rank != 2)} for rank in range(3)}
    )
    assert all(said == "" and end.startswith("preflight: 3 ranks agree") for said, end in results), results


def test_the_file_of_another_writer_stays_until_all_have_looked(run):
    """The first rank cannot write, so that the second is the writer. Its file stays for the slow third rank."""
    path, overrides, folder = run
    (folder / "a_file").touch()
    results = run_ranks(
        3, check, path, overrides, {0: {"overrides": [f"train.output_dir={folder}/a_file/run"]}, 2: {"late": 1.0}}
    )
    said = results[0][0]
    assert "cannot be written to" in said and "a_file" in said
    assert not any(row.startswith("rank 2 (") for row in rows(said)), said


def test_other_settings_on_one_rank_are_one_sentence(run):
    path, overrides, folder = run
    results = run_ranks(3, check, path, overrides, {1: {"overrides": ["loss.kl_coef=0.1"]}})
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
        check,
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
    """The path of one rank leads to another folder, like that of a node without the shared disk."""
    path, overrides, folder = run
    results = run_ranks(2, check_in_own_folder, path, overrides[:-1], str(folder))
    assert "rank 1 (" in results[0][0] and "train.output_dir" in results[0][0], results
    assert "is another folder than on rank 0" in results[0][0], results


def check_in_own_folder(path, overrides, folder):
    own = Path(folder) / f"node{os.environ['RANK']}"
    own.mkdir()
    os.chdir(own)
    return check(path, [*overrides, "train.output_dir=run"], {})


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
    [(said, _)] = run_ranks(1, check, path, [*overrides, f"model.path={broken}"], {})
    assert "model.path" in said and "mis-shaped" in said and str(broken) in said, said


def test_disk_that_is_too_small(material):
    from megatron_ral.planning.disk import DiskPlan, checkpoint_bytes, disk_problem, needed_bytes

    shape = read_shape(material["tiny"])
    config = load_config(
        "pretrained_configs/runs/ral_tiny.yaml", [f"model.path={material['tiny']}", "train.output_dir=/nonexistent"]
    )
    plan = DiskPlan.from_config(config)
    from safetensors import safe_open

    [file] = Path(material["tiny"]).glob("*.safetensors")
    with safe_open(str(file), "pt") as handle:
        sizes = {name: handle.get_tensor(name).numel() for name in handle.keys()}  # noqa: SIM118  # `safe_open` has no iterator
    trained = sum(size for name, size in sizes.items() if "visual" not in name)
    assert checkpoint_bytes(plan, shape) == 12 * trained
    assert needed_bytes(plan, shape) == 3 * 12 * trained + 4 * sum(sizes.values())
    assert disk_problem(plan, shape, needed_bytes(plan, shape)) is None
    assert "train.output_dir" in str(disk_problem(plan, shape, needed_bytes(plan, shape) - 1))

"""The script of the GPU acceptance on the CPU: its parts run smaller, and one that crashes does not hide the rest.

`end_to_end` takes minutes. Its pipeline is that of `test_video_search.py`; here its settings are resolved.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import PROJECT
from tools.acceptance.part import Setting
from tools.gpu_acceptance import SECONDS, table

PARTS = [name for name in SECONDS if name != "end_to_end"]
"""Parts that run here."""
CRASH = "tests.integration.crashing_part"
HANG = "tests.integration.hanging_part"


def environment(**more):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a group in this process has left
    own = {name: value for name, value in os.environ.items() if name not in names}
    return {**own, "OMP_NUM_THREADS": "1", "MEGATRON_RAL_PYTHON": sys.executable, **more}


def run(*arguments):
    return subprocess.run(
        ["bash", "tools/gpu_acceptance.sh", *map(str, arguments)],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def share_material(folder, material):
    """Let the parts use what the session has made."""
    paths = [str(material[name]) for name in ("tiny", "tiny_other", "data")]
    (folder / "tiny_material.json").write_text(json.dumps(paths))


@pytest.fixture(scope="module")
def ran(material, tmp_path_factory):
    """What the script printed, and the parts that it wrote, by name."""
    folder = tmp_path_factory.mktemp("acceptance")
    share_material(folder, material)
    done = run("--cpu", "--output-dir", folder, CRASH, *PARTS)
    written = json.loads((folder / "acceptance.json").read_text())
    assert written["device"] == "cpu"
    return done, {part["part"]: part for part in written["parts"]}


def test_a_part_that_crashes_hides_no_other(ran):
    done, parts = ran
    assert done.returncode == 1, "one part has failed"
    assert list(parts) == [CRASH, *PARTS]
    crashed = parts[CRASH]
    assert crashed["verdict"] == "failed" and crashed["reason"] == "exit status 1"
    assert [figure["name"] for figure in crashed["figures"]] == ["before the crash", "not a number"]
    assert crashed["figures"][1]["value"] == "nan" and crashed["figures"][1]["passes"] is False
    assert any("planted" in line for line in crashed["log"]) and "planted" in done.stdout


@pytest.mark.parametrize("part", PARTS)
def test_part_runs_on_a_cpu(ran, part):
    result = ran[1][part]
    assert result["verdict"] == "passed", (result["reason"], result["log"])
    assert result["figures"] and f"| **{part}** |" in ran[0].stdout


def test_figures_are_those_that_the_parts_promise(ran):
    names = {part: " ".join(figure["name"] for figure in result["figures"]) for part, result in ran[1].items()}
    for part, words in {
        "environment": ("torch", "SDPA of a prompt"),
        "sdpa_nan": ("MATH", "FLASH_ATTENTION"),
        "kernels": ("error of rows", "error of gradients", "term", "SDPA"),
        "flash_join": ("error of", "padding"),
        "bf16": ("cosine of the first gradients", "largest difference"),
        "stage": ("update", "rehearsed peak", "TFLOP/s"),
        "decode": ("equal tokens", "tokens per second", "share of the copy bandwidth"),
        "waits": ("rollout", "update"),
    }.items():
        assert all(word in names[part] for word in words), (part, names[part])


def test_a_part_that_hangs_is_ended_and_parts_without_time_are_named(tmp_path):
    done = run("--cpu", "--output-dir", tmp_path, "--limit", "20", HANG, "environment")
    hung, other = json.loads((tmp_path / "acceptance.json").read_text())["parts"]
    assert done.returncode == 1
    assert hung["verdict"] == "failed" and "ended at its limit" in hung["reason"]
    assert [figure["name"] for figure in hung["figures"]] == ["before the wait"]
    assert other["verdict"] == "not run" and other["reason"] == "no time was left"


def test_wrong_parts_are_refused_in_one_sentence(tmp_path):
    done = run("--cpu", "--output-dir", tmp_path / "never", "kernel")
    assert done.returncode == 2 and not (tmp_path / "never").exists()
    assert done.stderr.strip().startswith("error: PART = kernel is not known; take some of environment, sdpa_nan")


@pytest.mark.parametrize("phase, run, num_steps", [("sft", "sft_tiny", 6), ("rl", "ral_tiny", 3)])
def test_settings_of_the_pipeline_are_valid(phase, run, num_steps):
    from megatron_ral.config import load_config
    from tools.acceptance.end_to_end import SHORT

    other = {"sft": "rl:", "rl": "sft:"}[phase]
    overrides = [item.removeprefix(f"{phase}:") for item in SHORT if not item.startswith(other)]
    config = load_config(PROJECT / f"pretrained_configs/runs/{run}.yaml", ["model.path=x", *overrides])
    assert config.train.num_steps == num_steps


def test_exported_folder_is_run(material, tmp_path):
    from tools.acceptance.end_to_end import loads

    assert loads(material["tiny"], Setting("cpu", tmp_path)) == "finite"


def test_every_part_has_a_file_and_a_place_on_the_page():
    page = (PROJECT / "docs/results/gpu.md").read_text(encoding="utf-8")
    for part in SECONDS:
        assert (PROJECT / f"tools/acceptance/{part}.py").is_file() and f"| `{part}` |" in page
    assert table([]).startswith("| part | figure |")

"""docs/guide.md and docs/settings.md: the marked commands run as they stand there, and settings are what the source says."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ral.commands import settings
from megatron_ral.config import known_keys

PROJECT = Path(__file__).resolve().parents[2]
GUIDE = (PROJECT / "docs" / "guide.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash run\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder and what each block printed."""
    folder = tmp_path_factory.mktemp("guide")
    own = {
        name: value
        for name, value in os.environ.items()  # not what a group in this process has left there
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    environment = {
        **own,
        "OUT": str(folder),
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    printed = []
    for block in BLOCKS:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=PROJECT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-4000:]}"
        printed.append(done.stdout)
    return folder, printed


def test_commands_of_the_guide_run(ran):
    folder, printed = ran
    assert len(BLOCKS) == 6
    assert printed[0].count("the model: ") == 2, "two layouts"
    assert "stopped after step 2" in printed[1] or (folder / "run" / "checkpoints" / "step_00000002").is_dir()
    assert "2 samples" in printed[2] and (folder / "report.html").is_file()
    assert "resumed from" in printed[3] and (folder / "run" / "hf" / "config.json").is_file()
    assert "4 prompts: accuracy" in printed[4] and (folder / "evaluation.json").is_file()
    assert "from-run: " in printed[5] and (folder / "step_2" / "config.json").is_file()


def test_what_the_guide_names_exists():
    """Settings, and files of the project."""
    known = set(known_keys())
    sections = {key.split(".")[0] for key in known}
    named = {
        match
        for match in re.findall(r"\b([a-z_]+\.[a-z_]+)\b", GUIDE)
        if match.split(".")[0] in sections and not match.endswith((".json", ".md", ".html", ".py"))
    }
    assert len(named) > 30 and named - known <= {"model.generate", "watchdog.log"}, named - known  # a call, a file
    for path in re.findall(r"\b((?:tools|docs|launch_scripts|tests|pretrained_configs)/[\w./-]+\w)", GUIDE):
        assert (PROJECT / path).exists(), path


def test_settings_document_is_up_to_date():
    assert (PROJECT / "docs" / "settings.md").read_text(encoding="utf-8") == settings.render(), (
        "run python tools/make_settings_doc.py"
    )
    documented = set(re.findall(r"^- \*\*`([\w.]+)`\*\*: ", settings.render(), re.MULTILINE))
    leaves = {key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())}
    assert leaves <= documented and {"data.train.N.shards", "reward.functions.NAME.weight"} <= documented


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.classes = []

    def handle_starttag(self, tag, attributes):
        self.classes.append(dict(attributes).get("class"))


def test_the_page_of_the_guide_has_its_samples(ran):
    parser = _Tags()
    parser.feed((ran[0] / "report.html").read_text(encoding="utf-8"))
    assert parser.classes.count("sample") == 2 and parser.classes.count("token") >= 2

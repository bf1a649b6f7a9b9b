"""The documentation: marked commands run as they stand, settings and files it names exist, the README stays short."""

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
DOCS = PROJECT / "docs"
PAGES = [DOCS / "quickstart.md", DOCS / "running.md"]
"""Pages with commands that run, in the order in which they run."""
GUIDE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```bash run\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
WRITTEN = [*PROJECT.glob("*.md"), *(page for page in DOCS.rglob("*.md") if page.name != "settings.md")]
"""Every page that is written by hand."""


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
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-4000:]}"
        printed.append(done.stdout)
    return folder, printed


def test_commands_of_the_guide_run(ran):
    folder, printed = ran
    assert len(BLOCKS) == 6
    assert "stopped after step 2" in printed[0] or (folder / "run" / "checkpoints" / "step_00000002").is_dir()
    assert "resumed from" in printed[1] and (folder / "run" / "hf" / "config.json").is_file()
    assert "4 prompts: accuracy" in printed[2] and (folder / "evaluation.json").is_file()
    assert "2 samples" in printed[3] and (folder / "report.html").is_file()
    assert printed[4].count("the model: ") == 2, "two layouts"
    assert "from-run: " in printed[5] and (folder / "step_2" / "config.json").is_file()


def test_what_the_guide_names_exists():
    """Settings, and files of the project."""
    known = set(known_keys())
    sections = {key.split(".")[0] for key in known}
    text = "\n".join(page.read_text(encoding="utf-8") for page in WRITTEN if page.name != "CHANGELOG.md")
    named = {
        match
        for match in re.findall(r"(?<![/\w.])([a-z_]+\.[a-z_]+)\b(?![/(])", text)
        if match.split(".")[0] in sections
        and not match.endswith((".json", ".jsonl", ".md", ".html", ".py", ".safetensors"))
    }
    assert len(named) > 30 and named - known <= {"watchdog.log"}, named - known  # a file
    for page in WRITTEN:
        if page.name == "CHANGELOG.md":  # names what was there before
            continue
        text = re.sub(r"\(https?:[^)\s]*\)", "", page.read_text(encoding="utf-8"))
        for path in re.findall(
            r"\b((?:tools|docs|launch_scripts|tests|pretrained_configs|megatron_ral)/[\w./-]+\w)", text
        ):
            assert "NAME" in path or (PROJECT / path).exists(), f"{page.name}: {path}"
        for path in re.findall(r"(?<![\w/])((?:[a-z]+/)+\w+\.py)\b", text):  # below the project or the package
            found = any((root / path).exists() for root in (PROJECT, PROJECT / "megatron_ral"))
            assert found or "NAME" in path, f"{page.name}: {path}"


def test_links_between_pages_lead_somewhere():
    for page in WRITTEN:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[\w-]+)?\)", text):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name}: {target}{anchor}"


def test_pages_that_the_sources_name_exist():
    for folder in ("megatron_ral", "tools", "launch_scripts", "pretrained_configs", "tests"):
        for path in (PROJECT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".sbatch", ".yaml"):
                for page in re.findall(r"\bdocs/[\w/]+\.md", path.read_text(encoding="utf-8")):
                    assert (PROJECT / page).exists(), f"{path.relative_to(PROJECT)}: {page}"


def test_every_run_has_a_page_with_its_command():
    for config in (PROJECT / "pretrained_configs" / "runs").glob("*.yaml"):
        page = (DOCS / "runs" / f"{config.stem}.md").read_text(encoding="utf-8")
        assert "bash launch_scripts/" in page and "**Result" in page, config.stem


def test_pages_have_short_lines_and_the_readme_is_short():
    for page in WRITTEN:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{page.name}:{number}"
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200 and len(readme.split()) <= 1500


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

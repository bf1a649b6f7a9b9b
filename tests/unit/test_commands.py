"""The commands: each has help for a stranger, the tools call them, and a user's mistake ends with exit status 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ral.commands import main as console
from megatron_ral.commands import report, settings, shards
from megatron_ral.commands.common import command, one_sentence
from megatron_ral.errors import ConfigError
from tests.conftest import PROJECT

TOOLS = {
    "convert_checkpoint": "megatron-ral convert to-megatron",
    "make_shards": "megatron-ral shards make",
    "index_shards": "megatron-ral shards index",
    "inspect_shards": "megatron-ral inspect",
    "rehearse": "megatron-ral rehearse",
    "report": "megatron-ral report",
    "attention_report": "megatron-ral attention",
    "make_settings_doc": "megatron-ral settings",
}


def test_every_command_is_a_file_and_every_file_a_command():
    files = {path.stem for path in (PROJECT / "megatron_ral" / "commands").glob("*.py")}
    assert files - {"__init__", "common", "main"} == set(console.COMMANDS)


def test_list_of_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megatron-ral"])
    assert console.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in console.COMMANDS)
    assert console.main(["trian"]) == 2 and "COMMAND = 'trian'" in capsys.readouterr().err
    assert console.main([]) == 2 and "give a COMMAND" in capsys.readouterr().err
    assert shards.main(["remake"]) == 2 and "neither make nor index" in capsys.readouterr().err


@pytest.mark.parametrize("name", console.COMMANDS)
def test_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megatron-ral"])
    if name == "shards":
        assert console.main([name, "--help"]) == 0
    else:
        with pytest.raises(SystemExit) as ended:
            console.main([name, "--help"])
        assert ended.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 8 and (f"megatron-ral {name}" in text or f"-m megatron_ral.{name}" in text), text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name, usage", TOOLS.items())
def test_a_tool_calls_its_command_from_any_folder(name, usage, tmp_path):
    path = PROJECT / "tools" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(path), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "PATH": ""},
        timeout=120,
    )
    assert done.returncode == 0 and usage in done.stdout, done.stdout + done.stderr
    assert len(path.read_text().splitlines()) <= 12


def test_nothing_changes_the_import_path():
    """The process of reward functions gets its caller's path, so that both find the same modules. The sampler's server
    runs by its path in another environment and takes its own folder out of the path."""
    files = list((PROJECT / "tools").glob("*.py")) + list((PROJECT / "megatron_ral").rglob("*.py"))
    using = {path.relative_to(PROJECT).as_posix() for path in files if "sys.path" in path.read_text()}
    assert using == {
        "megatron_ral/rewards/process.py",
        "megatron_ral/rewards/worker.py",
        "megatron_ral/rollout/served/server.py",
    }


def test_an_error_of_the_user_is_one_sentence(capsys):
    @command
    def wrong(argv):
        raise ConfigError("--size", 0, "must be at least 1")

    assert wrong([]) == 2 and capsys.readouterr().err == "error: --size = 0 must be at least 1\n"


@pytest.mark.parametrize(
    "rank, everywhere, said", [(0, True, "a = 1 is"), (1, True, ""), (1, False, "rank 1: a = 1 is")]
)
def test_ranks_say_an_error_once(rank, everywhere, said, capsys, monkeypatch):
    ended = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("megatron_ral.commands.common.leave", ended.append)
    with one_sentence(everywhere):
        raise ConfigError("a", 1, "is too small")
    assert ended == [2] and (said in capsys.readouterr().err if said else not capsys.readouterr().err)


def test_report_without_an_evaluation(tmp_path, capsys):
    assert report.main(["--output-dir", str(tmp_path)]) == 2
    assert f"'{tmp_path}/sft/evaluation.json' cannot be read" in capsys.readouterr().err


def test_a_settings_document_that_is_out_of_date(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(settings, "OUTPUT", tmp_path / "settings.md")
    assert settings.main(["--check"]) == 1 and "out of date" in capsys.readouterr().err
    assert settings.main([]) == 0 == settings.main(["--check"])
    lines = Path(tmp_path / "settings.md").read_text().splitlines()
    assert max(map(len, lines)) <= 120 and "- **`model.path`**: text; default empty." in lines

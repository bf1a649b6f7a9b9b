"""Tried versions: pyproject.toml, the locks and the warning agree."""

import logging
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_ral.compat import versions
from megatron_ral.compat.versions import TRIED, TRIED_PYTHON, installed_versions, untried, warn_untried_versions

PROJECT = Path(__file__).parents[2]
DECLARED = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
LOCKS = {"3.11": "requirements.txt", "3.12": "requirements-3.12.txt", "3.13": "requirements-3.13.txt"}


def ranges(lines: list[str]) -> dict[str, SpecifierSet]:
    return {Requirement(line).name: Requirement(line).specifier for line in lines}


def pins(name: str) -> dict[str, str]:
    """Packages and exact versions of a lock."""
    found = {}
    for line in (PROJECT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==" and "*" not in pin.version, line
            found[requirement.name] = pin.version
    return found


def test_the_table_repeats_the_declared_ranges():
    declared = ranges(DECLARED["dependencies"])
    assert {name: declared[name] for name in TRIED} == {name: SpecifierSet(text) for name, text in TRIED.items()}
    assert SpecifierSet(DECLARED["requires-python"]) == SpecifierSet(TRIED_PYTHON)


@pytest.mark.parametrize("python, lock", LOCKS.items())
def test_a_lock_pins_every_declared_package_inside_its_range(python, lock):
    assert python in SpecifierSet(TRIED_PYTHON)
    pinned = pins(lock)
    for name, allowed in ranges(DECLARED["dependencies"] + DECLARED["optional-dependencies"]["tools"]).items():
        assert pinned[name] in allowed, name


def test_locks_differ_only_where_a_library_needs_a_newer_python():
    ours, *others = (pins(lock) for lock in LOCKS.values())
    for other in others:
        assert {name for name in ours if ours[name] != other[name]} == {"megatron-core"} and ours.keys() == other.keys()


def test_development_packages_are_pinned_and_in_no_lock():
    development = pins("requirements-dev.txt")
    for name in ranges(DECLARED["optional-dependencies"]["dev"]).keys() - {"megatron_ral"}:
        assert name in development and not any(name in pins(lock) for lock in LOCKS.values()), name


def test_versions_here_were_tried():
    assert untried(installed_versions()) == []


@pytest.mark.parametrize(
    "name, version, fits",
    [
        ("torch", "2.11.0", True),
        ("torch", "2.13.1+cu130", True),
        ("torch", "2.11.0a0+5dd9c3b.nv26.01", True),
        ("torch", "2.10.0", False),
        ("torch", "2.14.0", False),
        ("torch", "main", False),
        ("megatron-core", "0.16.0", False),
        ("megatron-core", "0.19.2", True),
        ("megatron-core", "0.20.0rc0", False),
        ("deepspeed", "0.19.9", False),
        ("Python", "3.13.9", True),
        ("Python", "3.14.0", False),
    ],
)
def test_range_of_a_version(name, version, fits):
    assert untried({name: version}) == ([] if fits else [f"{name} {version} (tried: {TRIED.get(name, TRIED_PYTHON)})"])


@pytest.mark.parametrize("rank, warnings", [("0", 1), ("1", 0)])
def test_one_warning_names_all_of_them_on_the_first_rank(rank, warnings, monkeypatch, caplog):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(
        versions, "installed_versions", lambda: {"torch": "2.10.0", "triton": "3.5.0", "Python": "3.11.7"}
    )
    with caplog.at_level(logging.WARNING):
        warn_untried_versions()
    assert len(caplog.records) == warnings
    for record in caplog.records:
        text = record.getMessage()
        assert "torch 2.10.0 (tried: >=2.11,<2.14)" in text and "triton 3.5.0" in text and "Python" not in text


def test_no_warning_where_all_were_tried(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(versions, "installed_versions", lambda: {"torch": "2.12.1"})
    warn_untried_versions()
    assert not caplog.records

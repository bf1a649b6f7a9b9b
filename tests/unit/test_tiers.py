"""The fast tier names tests that exist, and reaches every folder of the package and of the tests."""

import ast
import functools
from pathlib import Path

import pytest

from tests.tiers import FAST_ELSEWHERE, is_fast, missing_entries

PROJECT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent.name for path in (PROJECT / "megatron_ral").glob("*/__init__.py"))


def fast_files() -> list[Path]:
    unit = [path for path in (PROJECT / "tests/unit").glob("test_*.py") if is_fast(f"tests/unit/{path.name}::test")]
    return unit + [PROJECT / entry.partition("::")[0] for entry in FAST_ELSEWHERE]


@functools.cache
def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_entry_is_a_test():
    assert missing_entries(PROJECT) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_the_package_is_imported_by_a_fast_test(folder):
    wanted = f"megatron_ral.{folder}"
    assert any(name == wanted or name.startswith(f"{wanted}.") for path in fast_files() for name in imported(path))


def test_every_folder_of_tests_has_a_fast_one():
    folders = {path.parent.name for path in (PROJECT / "tests").glob("*/test_*.py")} - {"gpu"}
    assert folders == {path.parent.name for path in fast_files()}

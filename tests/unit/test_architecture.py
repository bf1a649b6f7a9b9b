"""Arrows go down only, and third parties stay in their rooms (the map in README.md)."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_ral"
FLOOR = {
    "config": 1,
    "functional": 1,
    "rewards": 1,
    "types": 1,
    "progress": 1,
    "parallel": 2,
    "data": 2,
    "compat": 3,
    "models": 3,
    "engine": 4,
    "rollout": 5,
    "training": 6,
    "planning": 7,
    "evaluate": 8,
    "train": 8,
    "cli": 8,
    "replay": 8,
}
MAY_IMPORT = {
    "torch.distributed": {"parallel", "compat"},
    "deepspeed": {"engine", "compat"},
    "webdataset": {"data/shards.py", "data/shard_maker.py", "demo"},
    "tensorboard": {"training/logging/tensorboard.py"},
    "triton": {"attention/triton_backend.py"},
    "torch.utils.tensorboard": {"training/logging/tensorboard.py"},
}


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(relative: str) -> str:
    return relative.split("/")[0].removesuffix(".py")


def test_every_module_is_in_a_room():
    for path in PACKAGE.rglob("*.py"):
        name = room(path.relative_to(PACKAGE).as_posix())
        assert name == "__init__" or name in FLOOR, name


def test_arrows_go_down():
    for path in PACKAGE.rglob("*.py"):
        here = room(path.relative_to(PACKAGE).as_posix())
        for name in imports(path):
            if name.startswith("megatron_ral."):
                there = name.split(".")[1]
                if there in FLOOR and there != here and here in FLOOR:
                    # compat and models share a floor; parallel uses compat only to install the CPU shims
                    allowed = FLOOR[there] < FLOOR[here] or {here, there} == {"parallel", "compat"} or there == "cli"
                    assert allowed, f"{path.name} ({here}) imports {name}"


def test_pure_rooms_import_nothing_of_ours():
    for here in ("functional", "rewards"):
        for path in (PACKAGE / here).glob("*.py"):
            for name in imports(path):
                if name.startswith("megatron_ral."):
                    assert name.startswith(f"megatron_ral.{here}"), f"{path.name} imports {name}"
    for path in (PACKAGE / "config").glob("*.py"):
        assert not any(name == "torch" or name.startswith("torch.") for name in imports(path)), path.name


def test_third_parties_stay_in_their_rooms():
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE).as_posix()
        for name in imports(path):
            for package, rooms in MAY_IMPORT.items():
                if name == package or name.startswith(package + "."):
                    assert relative in rooms or room(relative) in rooms, f"{relative} imports {name}"


def test_files_stay_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_every_public_function_says_what_it_does():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert path.name == "__init__.py" and not path.read_text() or ast.get_docstring(tree), path
        if room(path.relative_to(PACKAGE).as_posix()) != "functional":
            continue
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"

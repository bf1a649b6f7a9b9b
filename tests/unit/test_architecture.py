"""Structure of the package (docs/architecture.md): arrows go down only, third parties stay in their folders, settings
do not travel whole, and prose begins as it should."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_ral"
FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
FLOORS = (
    "errors",
    "types",
    "functional",
    "compat",
    "parallel",
    "attention",
    "config",
    "runtime",
    "rewards",
    "models",
    "data",
    "weights",
    "objectives",
    "engine",
    "rollout",
    "evaluation",
    "training",
    "planning",
    "demo",
    "commands",
    "train evaluate replay __main__",
)
"""Folders (and files of the top level) from the lowest floor up. A file imports from its own floor and those below."""
FLOOR = {name: index for index, names in enumerate(FLOORS) for name in names.split()}
THIRD_PARTIES = {
    "torch.distributed": ("parallel/", "compat/", "runtime/"),
    "deepspeed": ("engine/", "compat/"),
    "webdataset": ("data/shards.py", "data/shard_maker.py", "demo/"),
    "tensorboard": ("training/logging/tensorboard.py", "demo/"),
    "torch.utils.tensorboard": ("training/logging/tensorboard.py",),
    "wandb": ("training/logging/wandb.py",),
    "triton": ("attention/triton_kernels.py", "attention/triton_backend.py", "attention/triton_formula_kernels.py"),
}


def imports(tree: ast.AST):
    """Every imported name, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_files(tree: ast.AST) -> set[str]:
    """Files of the package that a file imports."""
    found = set()
    for name in imports(tree):
        if name.startswith("megatron_ral."):
            stem = name.split(".", 1)[1].replace(".", "/")
            found |= {path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in FILES}
    return found


def floor(path: str) -> int:
    return FLOOR[path.split("/")[0].removesuffix(".py")]


def test_every_file_has_a_floor():
    for path in FILES:
        assert path == "__init__.py" or floor(path) >= 0


def test_arrows_between_folders_go_down():
    for path, tree in FILES.items():
        for other in own_files(tree):
            if path != "__init__.py" and other != "__init__.py":
                assert floor(other) <= floor(path), f"{path} imports {other}, which is on a higher floor"


def test_arrows_between_files_form_no_circle():
    arrows = {path: own_files(tree) - {path} for path, tree in FILES.items()}
    done: set[str] = set()

    def visit(path: str, way: tuple[str, ...]) -> None:
        assert path not in way, " -> ".join((*way[way.index(path) :], path))
        if path not in done:
            for other in sorted(arrows[path]):
                visit(other, (*way, path))
            done.add(path)

    for path in FILES:
        visit(path, ())


def test_low_floors_import_nothing_above_them():
    for path, tree in FILES.items():
        if path.startswith(("functional/", "rewards/")):
            allowed = ("megatron_ral.functional", "megatron_ral.rewards", "megatron_ral.errors")
            names = [name for name in imports(tree) if name.startswith("megatron_ral.")]
            assert all(name.startswith(allowed) for name in names), (path, names)
        if path.startswith(("config/", "attention/targets/registry", "errors")):
            assert not any(name.split(".")[0] == "torch" for name in imports(tree)), f"{path} must not import torch"


def test_third_parties_stay_in_their_folders():
    for path, tree in FILES.items():
        for name in imports(tree):
            for package, places in THIRD_PARTIES.items():
                if name == package or name.startswith(package + "."):
                    assert path.startswith(places), f"{path} imports {name}"


def test_files_stay_short():
    for path in FILES:
        assert len((PACKAGE / path).read_text().splitlines()) <= 400, path


def functions(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_only_commands_trainer_and_builders_take_the_whole_configuration():
    """Leaf functions take values or small settings, which `from_config` makes."""
    allowed = ("commands/", "config/", "training/trainer.py", "training/build.py", "training/inputs.py")
    for path, tree in FILES.items():
        if path.startswith(allowed):
            continue
        for function in functions(tree):
            if function.name.endswith("from_config"):
                continue
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            taken = [arg.arg for arg in arguments if arg.annotation and "RunConfig" in ast.unparse(arg.annotation)]
            assert not taken, f"{path}: {function.name} takes the whole RunConfig as {taken}"


def test_dataclasses_have_at_most_two_optional_fields():
    for path, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(item) for item in node.decorator_list):
                optional = [
                    ast.unparse(item.target)
                    for item in node.body
                    if isinstance(item, ast.AnnAssign)
                    and re.search(r"Optional\[|\| None", ast.unparse(item.annotation))
                ]
                assert len(optional) <= 2, f"{path}: {node.name} has the optional fields {optional}"


def test_errors_come_in_parts():
    """Key, value and remedy, so that nothing has to read a sentence back."""
    for path, tree in FILES.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("UserError", "ConfigError", "CheckpointError", "DataError")
            ):
                given = len(node.args) + len(node.keywords)
                starred = any(isinstance(item, ast.Starred) for item in node.args)
                assert given == 3 or starred, f"{path}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_docstrings_begin_with_their_subject():
    forbidden = ("Of", "That", "Those", "What", "Whether", "Who", "As")
    for path, tree in FILES.items():
        assert (path.endswith("__init__.py") and not tree.body) or ast.get_docstring(tree), f"{path} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node) or ""
                name = getattr(node, "name", "module")
                assert text.split(" ")[0] not in forbidden, f"{path}: {name}: {text[:60]}"


def test_every_public_function_of_the_mathematics_says_what_it_does():
    for path, tree in FILES.items():
        if path.startswith(("functional/", "attention/", "parallel/", "objectives/")):
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{path}: {node.name}"

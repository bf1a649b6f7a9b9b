"""Write docs/settings.md: every setting with its type, default and meaning, from the configuration's dataclasses.

    python tools/make_settings_doc.py            # write it
    python tools/make_settings_doc.py --check    # exit status 1 where it is not what the dataclasses say

The meaning of a setting is the string under it in megatron_ral/config/*.py, which only the source holds.
"""

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
OUTPUT = PROJECT / "docs" / "settings.md"
WORDS = {
    "str": "text",
    "bool": "true or false",
    "int": "integer",
    "float": "number",
    "PositiveInt": "integer > 0",
    "NonNegativeInt": "integer >= 0",
    "PositiveFloat": "number > 0",
    "NonNegativeFloat": "number >= 0",
    "Fraction": "number >= 0, <= 1",
}
BOUNDS = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}


@dataclass(frozen=True)
class Setting:
    """One field of a section."""

    name: str
    annotation: ast.expr
    default: ast.expr | None
    """None: it must be given."""
    meaning: str


def read_sections() -> dict[str, tuple[str, list[Setting]]]:
    """Name of each dataclass -> (its docstring, its settings)."""
    sections = {}
    for path in sorted((PROJECT / "megatron_ral" / "config").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                sections[node.name] = (_one_line(ast.get_docstring(node) or ""), _settings(node))
    return sections


def _settings(section: ast.ClassDef) -> list[Setting]:
    settings = []
    for node, following in zip(section.body, [*section.body[1:], None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            documented = (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            )
            meaning = _one_line(following.value.value) if documented else ""
            settings.append(Setting(node.target.id, node.annotation, node.value, meaning))
    return settings


def _one_line(text: str) -> str:
    return " ".join(text.split())


def kind(annotation: ast.expr) -> str:
    """What a value may be, in words."""
    if isinstance(annotation, ast.Name):
        return WORDS.get(annotation.id, annotation.id)
    assert isinstance(annotation, ast.Subscript), ast.unparse(annotation)
    outer, inner = ast.unparse(annotation.value), annotation.slice
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if outer == "Literal":
        return ", ".join(f"`{part.value}`" for part in parts)
    if outer == "Annotated":
        bounds = [f"{BOUNDS[ast.unparse(part.func)]} {ast.unparse(part.args[0])}" for part in parts[1:]]
        return f"{kind(parts[0])} {', '.join(bounds)}"
    if outer == "tuple":
        return f"list of {_several(parts[0])}"
    if outer == "dict":
        return f"mapping of names to {_several(parts[1])}"
    raise AssertionError(f"no words for {ast.unparse(annotation)}")


def _several(annotation: ast.expr) -> str:
    return "sections" if ast.unparse(annotation).endswith("Config") else f"{kind(annotation)}s"


def shown_default(value: ast.expr | None) -> str:
    """As YAML has it."""
    if value is None:
        return "must be given"
    if isinstance(value, ast.Call):  # a mutable default
        return "`{}`"
    default = ast.literal_eval(value)
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    if isinstance(default, bool):
        return "`true`" if default else "`false`"
    return "empty" if default == "" else f"`{default}`"


def render() -> str:
    """The whole file."""
    sections = read_sections()
    lines = [
        "# Settings",
        "",
        "Made by `python tools/make_settings_doc.py` from `megatron_ral/config/`; edit it there. In a "
        "file `section: {key: value}`, on a command line `section.key=value`.",
        "",
    ]
    top = sections["RunConfig"][1]
    plain = [setting for setting in top if not ast.unparse(setting.annotation).endswith("Config")]
    lines += ["## Outside the sections", "", *_table("", plain)]
    for setting in top:
        if setting not in plain:
            lines += _section(setting.name, ast.unparse(setting.annotation), sections)
    return "\n".join(lines)


def _section(path: str, name: str, sections: dict[str, tuple[str, list[Setting]]]) -> list[str]:
    """A section, and those that its lists and mappings hold."""
    about, settings = sections[name]
    lines = [f"## {path}", "", _cell(about), "", *_table(f"{path}.", settings)]
    for setting in settings:
        if inner := re.search(r"\w+Config", ast.unparse(setting.annotation)):
            place = "NAME" if "dict" in ast.unparse(setting.annotation) else "N"
            lines += _section(f"{path}.{setting.name}.{place}", inner[0], sections)
    return lines


def _table(prefix: str, settings: list[Setting]) -> list[str]:
    rows = [
        f"| `{prefix}{setting.name}` | {kind(setting.annotation)} | {shown_default(setting.default)} "
        f"| {_cell(setting.meaning)} |"
        for setting in settings
    ]
    return ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""]


def _cell(text: str) -> str:
    """Inside a table: bars and what looks like HTML outside of code as they are."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where the file is out of date"
    )
    arguments = parser.parse_args(argv)
    text = render()
    if not arguments.check:
        OUTPUT.write_text(text, encoding="utf-8")
    elif not OUTPUT.exists() or OUTPUT.read_text(encoding="utf-8") != text:
        print(
            "error: docs/settings.md is not what the dataclasses say; run python tools/make_settings_doc.py",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

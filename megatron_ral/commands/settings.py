"""Write docs/settings.md: every setting with its type, default and meaning.

    megatron-ral settings            # write it
    megatron-ral settings --check    # exit status 1 where it is out of date

Everything is read from the source of megatron_ral/config/*.py, because the meaning of a setting is the string under it.
Also `python tools/make_settings_doc.py`.
"""

import argparse
import ast
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from megatron_ral.attention.targets.registry import TARGETS
from megatron_ral.commands.common import Arguments

PACKAGE = Path(__file__).resolve().parents[1]
OUTPUT = PACKAGE.parent / "docs" / "settings.md"
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
    "TargetName": ", ".join(f"`{name}`" for name in TARGETS),
}
BOUNDS = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}


@dataclass(frozen=True)
class Setting:
    """One field of a section."""

    name: str
    annotation: ast.expr
    default: ast.expr | None
    """Default in the source; None for a setting that must be given."""
    meaning: str


def read_sections() -> dict[str, tuple[str, list[Setting]]]:
    """Return the docstring and the settings of each section, by the name of its dataclass."""
    sections = {}
    for path in sorted((PACKAGE / "config").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                sections[node.name] = (_one_line(ast.get_docstring(node) or ""), _settings(node))
    return sections


def _settings(section: ast.ClassDef) -> list[Setting]:
    settings = []
    for node, following in zip(section.body, [*section.body[1:], None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            documented = following.value if isinstance(following, ast.Expr) else None
            text = documented.value if isinstance(documented, ast.Constant) else None
            meaning = _one_line(text) if isinstance(text, str) else ""
            settings.append(Setting(node.target.id, node.annotation, node.value, meaning))
    return settings


def _one_line(text: str) -> str:
    return " ".join(text.split())


def kind(annotation: ast.expr) -> str:
    """Return the possible values of a setting in words."""
    if isinstance(annotation, ast.Name):
        return WORDS.get(annotation.id, annotation.id)
    assert isinstance(annotation, ast.Subscript), ast.unparse(annotation)
    outer, inner = ast.unparse(annotation.value), annotation.slice
    parts = cast(list[Any], inner.elts if isinstance(inner, ast.Tuple) else [inner])
    if outer == "Literal":
        return ", ".join(f"`{part.value}`" for part in parts)
    if outer == "Annotated":
        bounds = [f"{BOUNDS[ast.unparse(part.func)]} {ast.unparse(part.args[0])}" for part in parts[1:]]
        return f"{kind(parts[0])} {', '.join(bounds)}"
    if outer == "tuple" and ast.unparse(parts[0]).startswith("Literal"):
        return f"list of any of {kind(parts[0])}"
    if outer == "tuple":
        return f"list of {_several(parts[0])}"
    if outer == "dict":
        return f"mapping of names to {_several(parts[1])}"
    raise AssertionError(f"no words for {ast.unparse(annotation)}")


def _several(annotation: ast.expr) -> str:
    return "sections" if ast.unparse(annotation).endswith("Config") else f"{kind(annotation)}s"


def shown_default(value: ast.expr) -> str:
    """Return a default as YAML spells it."""
    if isinstance(value, ast.Call):  # a mutable default
        return "`{}`"
    default = ast.literal_eval(value)
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    if isinstance(default, bool):
        return "`true`" if default else "`false`"
    return "empty" if default == "" else f"`{default}`"


def render() -> str:
    """Return the whole file."""
    sections = read_sections()
    lines = [
        "# Settings",
        "",
        "Generated from `megatron_ral/config/` by `megatron-ral settings`; edit the descriptions there. Write a",
        "setting in a file as `section: {key: value}`, on a command line as `section.key=value`.",
        "",
    ]
    top = sections["RunConfig"][1]
    plain = [setting for setting in top if not ast.unparse(setting.annotation).endswith("Config")]
    lines += ["## Outside the sections", "", *_list("", plain)]
    for setting in top:
        if setting not in plain:
            lines += _section(setting.name, ast.unparse(setting.annotation), sections)
    return "\n".join(lines)


def _section(path: str, name: str, sections: dict[str, tuple[str, list[Setting]]]) -> list[str]:
    """Return the lines of a section, and of the sections in its lists and mappings."""
    about, settings = sections[name]
    plain = [setting for setting in settings if not isinstance(setting.annotation, ast.Name) or not _inner(setting)]
    lines = [f"## {path}", "", *_paragraph(about), "", *_list(f"{path}.", plain)]
    for setting in settings:
        if inner := _inner(setting):
            text = ast.unparse(setting.annotation)
            place = ".NAME" if "dict" in text else ".N" if "tuple" in text else ""
            lines += _section(f"{path}.{setting.name}{place}", inner, sections)
    return lines


def _inner(setting: Setting) -> str:
    """Return the name of the section that a setting holds, empty if it holds none."""
    found = re.search(r"\w+Config", ast.unparse(setting.annotation))
    return found[0] if found else ""


def _list(prefix: str, settings: list[Setting]) -> list[str]:
    lines = []
    for setting in settings:
        default = "must be given" if setting.default is None else f"default {shown_default(setting.default)}"
        head = f"- **`{prefix}{setting.name}`**: {kind(setting.annotation)}; {default}."
        lines += textwrap.wrap(head, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        lines += _paragraph(setting.meaning, "  ")
    return [*lines, ""]


def _paragraph(text: str, indent: str = "") -> list[str]:
    """Return text as lines of at most 120 characters, with what Markdown would interpret outside of code escaped."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return textwrap.wrap(
        "`".join(parts),
        120,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def main(argv: Arguments = None) -> int:
    """Write the file, or with --check compare it."""
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
            "error: docs/settings.md is out of date; run megatron-ral settings (or python tools/make_settings_doc.py)",
            file=sys.stderr,
        )
        return 1
    return 0

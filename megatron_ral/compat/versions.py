"""Versions of Python and of the libraries that this package was tried with, and one warning outside them.

The workarounds in this folder depend on the internals of these libraries. `pyproject.toml` declares the same ones, and
`tests/unit/test_versions.py` compares both. The warning is needed because the container mode of launch_scripts/setup.sh
uses the torch of the image without pip's check of the declared ranges.
"""

import logging
import os
import sys
from importlib import metadata
from typing import Mapping

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

TRIED_PYTHON = ">=3.11,<3.14"
TRIED: Mapping[str, str] = {
    "torch": ">=2.11,<2.14",
    "megatron-core": ">=0.16.1,<0.20",
    "deepspeed": "==0.19.8",
    "transformers": ">=5.17,<5.24",
    "triton": ">=3.6,<3.8",
}


def installed_versions() -> dict[str, str]:
    """Return the installed versions of Python and of the libraries in `TRIED`, by name, without importing them."""
    versions = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for name in TRIED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def untried(versions: Mapping[str, str]) -> list[str]:
    """Return one phrase, "NAME VERSION (tried: RANGE)", per version that lies outside its tried range.

    A build before a release counts as that release, because images are built from snapshots ("2.12.0a0+5dd9c3b").
    """
    phrases = []
    for name, version in versions.items():
        tried = TRIED_PYTHON if name == "Python" else TRIED[name]
        try:
            inside = Version(version).base_version in SpecifierSet(tried)
        except InvalidVersion:
            inside = False
        if not inside:
            phrases.append(f"{name} {version} (tried: {tried})")
    return phrases


def warn_untried_versions() -> None:
    """Log one warning on rank 0 that names every installed version outside its tried range."""
    phrases = untried(installed_versions()) if int(os.environ.get("RANK", 0)) == 0 else []
    if phrases:
        logging.getLogger(__name__).warning(
            "not tried with %s; bash tests/run.sh tells whether the workarounds in megatron_ral/compat still fit",
            ", ".join(phrases),
        )

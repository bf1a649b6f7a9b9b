"""Typed configuration: dataclasses with every default (`sections.py`) and a strict loader (`load.py`)."""

from megatron_ral.config.load import check_layout, dump_config, flat_settings, load_config
from megatron_ral.config.sections import RunConfig

__all__ = ["RunConfig", "check_layout", "dump_config", "flat_settings", "load_config"]

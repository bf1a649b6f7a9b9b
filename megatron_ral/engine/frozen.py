"""Frozen model (reference, teacher, or the model of an evaluation): a stage under ZeRO-3 without an optimizer."""

from megatron_ral.engine.settings import EngineSettings
from megatron_ral.engine.stage import StageEngine
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.process_groups import ProcessGroups


class FrozenEngine(StageEngine):
    """Frozen stage of one rank. It runs forward and generates, and never changes."""

    def __init__(self, shape: ModelShape, process_groups: ProcessGroups, settings: EngineSettings):
        super().__init__(shape, process_groups, settings)

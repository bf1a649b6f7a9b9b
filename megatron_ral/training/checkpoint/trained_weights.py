"""Trained weights of a checkpoint by Hugging Face name, so that any step can be exported without starting the run."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_ral.engine.settings import shape_from_config
from megatron_ral.errors import CheckpointError, ConfigError
from megatron_ral.models.adapters import adapter_weight, with_adapter
from megatron_ral.models.parameter_shapes import expected_shapes
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.training.checkpoint.files import CONFIG, damage, read_manifest, state_file
from megatron_ral.training.checkpoint.settings import read_saved_config
from megatron_ral.weights.conversion import open_weights, renamed_when_complete
from megatron_ral.weights.huggingface import Weights
from megatron_ral.weights.peft_folder import fill_folder
from megatron_ral.weights.resharding import ReshardedState, held_parameters


class TrainedWeights(Weights):
    """Weights of a checkpoint in the precision of the run (model.dtype), equal to the run's own export of that step.

    Trained tensors come from the float32 master weights of the checkpoint, in whatever layout it was written. Frozen
    tensors come from the model that the run started from. At most two parameters are in memory at a time.

    Args:
        checkpoint: Folder `<output_dir>/checkpoints/step_NNNNNNNN`.
        model: Model that the run started from; empty: model.path of the run.

    Raises:
        CheckpointError: The folder is not a whole checkpoint, or is of another model.
        ConfigError: The model that the run started from cannot be used.
    """

    def __init__(self, checkpoint: str | Path, model: str = ""):
        self.path = Path(checkpoint)
        reason = damage(self.path) if self.path.is_dir() else "there is no such folder"
        if reason is not None:
            raise CheckpointError(
                f"'{checkpoint}'",
                None,
                f"is no whole checkpoint of a run ({reason}); give <output_dir>/checkpoints/step_NNNNNNNN",
            )
        config, manifest = read_saved_config(self.path), read_manifest(self.path)
        self.source = model or config.model.path
        key = "--model" if model else f"model.path of '{self.path / CONFIG}'"
        try:
            self.shape = shape_from_config(config, key, self.source)
        except ConfigError as error:
            remedy = f"{error.remedy}; give the folder that the run started from with --model"
            raise ConfigError(error.key, error.value, remedy) from None
        manifest.check_model(self.path, self.shape, config.model.train_vision)
        self._frozen, self._shapes = open_weights(self.source), expected_shapes(self.shape)
        self._dtype = getattr(torch, config.model.dtype)
        self.format_tags = config.model.format_tags
        self._held = {
            source: held for held in held_parameters(self.shape, 1, 1)[0].values() for source in held.tensor.sources
        }
        self._state = ReshardedState(
            self.shape, manifest.layout, RankLayout(0, 1, 1, 1), lambda rank: self.path / state_file(rank)
        )
        self._trains_vision = config.model.train_vision
        self._where = dict.fromkeys(self._shapes)
        self._read: dict[str, Tensor] = {}
        """The last two parameters that were read."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor on the CPU.

        Raises:
            CheckpointError: The checkpoint has no master weights of the tensor.
        """
        if self.shape.adapter is not None:
            pair = [adapter_weight(name, factor) for factor in "AB"]
            factors = {factor: self.trained(factor) for factor in pair if factor in self._held}
            return with_adapter(self._frozen[name].to(self._dtype), name, factors, self.shape.adapter)
        if name.startswith("visual.") and not self._trains_vision:
            return self._frozen[name].to(self._dtype)
        return self.trained(name)

    def trained(self, name: str) -> Tensor:
        """Return a tensor that the run trained, or a factor of an adapter, on the CPU.

        Raises:
            CheckpointError: The checkpoint has no master weights of the tensor.
        """
        held = self._held[name]
        full = self._read.get(held.tensor.name)
        if full is None:
            flat = self._state.get(f"{held.tensor.name}/master")
            if flat is None:
                raise CheckpointError(
                    f"'{self.path}'",
                    None,
                    f"has no master weights of '{held.tensor.name}'; it is damaged, export another checkpoint",
                )
            full = flat[: held.numel].view(held.shape)
            # Queries, keys and values are one parameter and their biases another, and readers ask for them in turn.
            self._read = dict([*list(self._read.items())[-1:], (held.tensor.name, full)])
        return held.tensor.split(full)[held.tensor.sources.index(name)].to(self._dtype)

    def write_adapters(self, output: str | Path) -> None:
        """Write the adapters as a PEFT folder, which must not exist.

        Raises:
            CheckpointError: The run trained no adapters, or the checkpoint is damaged.
            ConfigError: `output` exists.
        """
        if self.shape.adapter is None:
            raise CheckpointError(f"'{self.path}'", None, "is of a run without adapters; leave --adapter out")
        with renamed_when_complete(output) as partial:
            fill_folder(partial, self.shape, self.source, self._dtype, self.trained)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._shapes[name]

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the type of a tensor without reading it."""
        return self._dtype

"""A checkpoint of a run, seen as Hugging Face's tensors: for a folder of any step, without starting the run."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_ral.config import load_config
from megatron_ral.errors import CheckpointError, ConfigError
from megatron_ral.models.parameter_shapes import expected_shapes
from megatron_ral.weights.conversion import open_weights
from megatron_ral.weights.huggingface import Weights
from megatron_ral.weights.resharding import ReshardedState, held_parameters
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.training.checkpoint.files import CONFIG, damage, read_manifest, state_file


class TrainedWeights(Weights):
    """Trained tensors from the float32 master weights of a checkpoint of any layout, the frozen ones from where the run
    started; in the precision of the run (model.dtype), as its own export has them.

    In memory are at most two parameters at a time.

    Args:
        checkpoint: `<output_dir>/checkpoints/step_NNNNNNNN`.
        model: where the run started; empty: model.path of the run.

    Raises:
        CheckpointError, ConfigError: no whole checkpoint, or one of another model.
    """

    def __init__(self, checkpoint: str | Path, model: str = ""):
        self.path = Path(checkpoint)
        reason = damage(self.path) if self.path.is_dir() else "there is no such folder"
        if reason is not None:
            raise CheckpointError(
                f"'{checkpoint}' is no whole checkpoint of a run ({reason}); give "
                "<output_dir>/checkpoints/step_NNNNNNNN"
            )
        config, manifest = load_config(self.path / CONFIG), read_manifest(self.path)
        self.source = model or config.model.path
        key = "--model" if model else f"model.path of '{self.path / CONFIG}'"
        try:
            self.shape = read_shape(self.source, key)
        except ConfigError as error:
            raise ConfigError(f"{error}; give the folder that the run started from with --model") from None
        manifest.check_model(self.path, self.shape, config.model.train_vision)
        self._frozen, self._shapes = open_weights(self.source), expected_shapes(self.shape)
        self._dtype = getattr(torch, config.model.dtype)
        self._held = {
            source: held for held in held_parameters(self.shape, 1, 1)[0].values() for source in held.tensor.sources
        }
        self._state = ReshardedState(
            self.shape, manifest.layout, RankLayout(0, 1, 1, 1), lambda rank: self.path / state_file(rank)
        )
        self._trains_vision = config.model.train_vision
        self._where = dict.fromkeys(self._shapes)
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name.startswith("visual.") and not self._trains_vision:
            return self._frozen[name].to(self._dtype)
        held = self._held[name]
        full = self._read.get(held.tensor.name)
        if full is None:
            flat = self._state.get(f"{held.tensor.name}/master")
            if flat is None:
                raise CheckpointError(f"'{self.path}' has no master weights of '{held.tensor.name}'; it is damaged")
            full = flat[: held.numel].view(held.shape)
            # queries, keys and values are one parameter, their biases another
            self._read = dict([*list(self._read.items())[-1:], (held.tensor.name, full)])
        return held.tensor.split(full)[held.tensor.sources.index(name)].to(self._dtype)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype_of(self, name: str) -> torch.dtype:
        return self._dtype

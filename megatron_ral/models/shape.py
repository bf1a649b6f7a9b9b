"""Shape of a model, read from a Hugging Face folder; pure, so that layouts are checked before anything is built."""

import dataclasses
from dataclasses import dataclass
from typing import Sequence

from transformers import AutoConfig, PretrainedConfig

from megatron_ral.errors import ConfigError
from megatron_ral.models.families import FAMILIES, Family
from megatron_ral.models.folder import config_folder
from megatron_ral.parallel.rank_layout import stage_sizes


@dataclass(frozen=True)
class ModelShape:
    """Language model of a checkpoint; `vision` stays Hugging Face's own config."""

    path: str
    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision: PretrainedConfig

    @property
    def num_deepstack_layers(self) -> int:
        """First language layers after which features of the vision tower are added."""
        return len(getattr(self.vision, "deepstack_visual_indexes", ()))

    def layer_index(self, layer: int, key: str = "loss.attention_layers") -> int:
        """0-based layer of a possibly negative index.

        Raises:
            ConfigError: no such layer.
        """
        index = layer + self.num_layers if layer < 0 else layer
        if not 0 <= index < self.num_layers:
            raise ConfigError(f"{key} names layer {layer} but '{self.path}' has {self.num_layers} layers")
        return index

    def layer_indices(self, layers: Sequence[int], key: str = "loss.attention_layers") -> list[int]:
        """0-based layers of a setting, each once.

        Raises:
            ConfigError: no such layer, or the same one under two names.
        """
        indices = [self.layer_index(layer, key) for layer in layers]
        if len(set(indices)) != len(indices):
            raise ConfigError(f"{key} = {list(layers)} names a layer of '{self.path}' twice ({self.num_layers} layers)")
        return indices

    def check_same_architecture(self, other: "ModelShape", key: str) -> None:
        """Raise ConfigError naming `key` and the first field in which `other` differs (its path aside)."""
        for item in dataclasses.fields(self):
            ours, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name == "vision":
                ours, theirs = ours.to_dict(), theirs.to_dict()
            if item.name != "path" and ours != theirs:
                raise ConfigError(
                    f"{key} = '{other.path}' has {item.name} = {theirs}, but '{self.path}' has {ours}; "
                    "it must be a checkpoint of the same architecture"
                )

    def check_teacher(self, teacher: "ModelShape") -> None:
        """Raise ConfigError naming both values where a teacher does not see a picture as this model does."""
        names = {
            "patch_size": "pixels along a side of a patch",
            "temporal_patch_size": "frames of one patch",
            "spatial_merge_size": "patches along a side of one visual token",
            "tokens_per_second": "temporal positions of a second of video",
        }
        if teacher.family != self.family:
            raise ConfigError(
                f"teacher.path = '{teacher.path}' is a '{teacher.family.model_type}' model, but model.path = "
                f"'{self.path}' is a '{self.family.model_type}': their visual tokens differ"
            )
        for name, what in names.items():
            ours, theirs = getattr(self.vision, name, None), getattr(teacher.vision, name, None)
            if ours != theirs:
                raise ConfigError(
                    f"teacher.path = '{teacher.path}' has vision_config.{name} = {theirs} ({what}), but "
                    f"model.path = '{self.path}' has {ours}: their visual tokens are not the same pieces of a "
                    "picture; distil from a teacher with the same visual grid"
                )
        for name in ("image_token_id", "video_token_id"):
            ours, theirs = getattr(self, name), getattr(teacher, name)
            if ours != theirs:
                raise ConfigError(
                    f"teacher.path = '{teacher.path}' has {name} = {theirs}, but model.path = '{self.path}' "
                    f"has {ours}; distil from a teacher with the same tokenizer"
                )

    def check_layout(self, tensor_size: int, pipeline_size: int, section: str = "parallel") -> None:
        """Raise ConfigError naming the key where tensor or pipeline parallelism does not divide this model."""
        key = f"{section}.tensor_model_parallel_size"
        for value, what in (
            (self.num_attention_heads, "attention heads"),
            (self.ffn_hidden_size, "feed-forward units"),
        ):
            if value % tensor_size:
                raise ConfigError(f"{key} = {tensor_size} does not divide the {value} {what} of '{self.path}'")
        if self.num_query_groups % tensor_size and tensor_size % self.num_query_groups:
            raise ConfigError(
                f"{key} = {tensor_size} neither divides nor is a multiple of the "
                f"{self.num_query_groups} key/value heads of '{self.path}'"
            )
        key = f"{section}.pipeline_model_parallel_size"
        if self.num_layers < pipeline_size:
            raise ConfigError(f"{key} = {pipeline_size} is more than the {self.num_layers} layers of '{self.path}'")
        first = stage_sizes(self.num_layers, pipeline_size)[0]
        if first < self.num_deepstack_layers:
            raise ConfigError(
                f"{key} = {pipeline_size} leaves {first} layers on the first stage, but features of the "
                f"vision tower enter the first {self.num_deepstack_layers} layers of '{self.path}', "
                "which must be on that stage; take fewer stages"
            )

    def padded_vocab_size(self, tensor_size: int) -> int:
        """Vocabulary rows over all tensor ranks: the next multiple of their number. Padding never leaves the model: its
        logits are masked, its rows are not exported."""
        return -(-self.vocab_size // tensor_size) * tensor_size


def read_shape(path: str, key: str = "model.path") -> ModelShape:
    """Shape of the checkpoint in a Hugging Face or Megatron folder.

    Raises:
        ConfigError: no folder, no config, or a family this project does not know.
    """
    folder = config_folder(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key} = '{path}' is neither a Hugging Face nor a Megatron folder (no config.json)")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for what a config.json can hold
        raise ConfigError(f"{key} = '{path}': config.json is not readable ({' '.join(str(error).split())})") from None
    if config.model_type not in FAMILIES:
        raise ConfigError(f"{key} = '{path}' is a '{config.model_type}' model; known families: {', '.join(FAMILIES)}")
    text = config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    _refuse_unknown_variants(text, width, f"{key} = '{path}'")
    return ModelShape(
        path=str(path),
        family=FAMILIES[config.model_type],
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=width,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(text.rope_parameters["rope_theta"]),
        mrope_section=tuple(text.rope_parameters["mrope_section"]),
        tie_word_embeddings=config.tie_word_embeddings,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision=config.vision_config,
    )


def _refuse_unknown_variants(text: PretrainedConfig, width: int, name: str) -> None:
    """Raise ConfigError for what the config.json of a known family may ask for and this project would not do."""
    rope = text.rope_parameters
    asked = {
        "hidden_act": (text.hidden_act, "silu"),
        "attention_dropout": (text.attention_dropout, 0.0),
        "attention_bias": (getattr(text, "attention_bias", False), False),
        "layer_types": (sorted(set(getattr(text, "layer_types", None) or ["full_attention"])), ["full_attention"]),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
        "rope_parameters.mrope_section, summed": (sum(rope.get("mrope_section") or ()), width // 2),
    }
    for field, (value, known) in asked.items():
        if value != known:
            raise ConfigError(f"{name}: config.json has text_config.{field} = {value!r}; only {known!r} is known")

"""Shape of a model, read from its config.json, and the checks that need nothing else.

No module is built here, so that a layout can be checked before a run starts.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Optional, Sequence

from transformers import AutoConfig, PretrainedConfig

from megatron_ral.errors import ConfigError
from megatron_ral.models.adapters import AdapterShape, is_adapter
from megatron_ral.models.families import FAMILIES, Family, PatchRules, find_family
from megatron_ral.models.folder import check_fetched, config_folder, foreign_content
from megatron_ral.models.linear_attention import LinearAttentionShape
from megatron_ral.parallel.rank_layout import stage_sizes

_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Entries of a config.json that give the number of experts of a layer, by the names of different families."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model. Names are megatron-core's where it has one, otherwise Hugging Face's."""

    path: str
    """Model folder."""
    family: Family
    """Family of the model, which gives all that no size tells."""
    num_layers: int
    """Number of language layers."""
    hidden_size: int
    """Width of the hidden states."""
    ffn_hidden_size: int
    """Width inside the feed-forward blocks."""
    num_attention_heads: int
    """Number of query heads."""
    num_query_groups: int
    """Number of key/value heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Number of rows of the embeddings, without padding."""
    max_position_embeddings: int
    """Largest number of positions."""
    rms_norm_eps: float
    """Number added to the mean square in norms."""
    rope_theta: float
    """Base of the rotary frequencies."""
    mrope_section: tuple[int, ...]
    """Number of rotary frequencies of each axis (time, height, width); one number where positions have one axis."""
    tie_word_embeddings: bool
    """True if the LM head is the embedding matrix."""
    image_token_id: int
    """Token that stands for one visual token of an image."""
    video_token_id: int
    """Token that stands for one visual token of a video."""
    visual_token_ids: tuple[int, ...] = field(compare=False)
    """Tokens that stand for visual input or around it, those of images and videos among them. Without pixels they mean
    nothing, so that sampling never draws one."""
    vision: PretrainedConfig
    """Hugging Face's own configuration of the vision tower."""
    linear_attention: Optional[LinearAttentionShape] = None
    """Sizes of the layers with linear attention; None: there are none."""
    adapter: Optional[AdapterShape] = field(default=None, compare=False)
    """Adapters of the language layers; None: there are none."""

    def is_trained(self, name: str, train_vision: bool = False) -> bool:
        """Return whether a run trains a parameter of a `MultimodalStage`.

        Args:
            name: Name of the parameter.
            train_vision: Whether the vision tower is trained.
        """
        if self.adapter is not None:
            return is_adapter(name)
        return train_vision or not name.startswith("visual.")

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        """0-based layers with softmax attention, the only ones that have attention distributions."""
        linear = () if self.linear_attention is None else self.linear_attention.layers
        return tuple(layer for layer in range(self.num_layers) if layer not in linear)

    @property
    def rotary_width(self) -> int:
        """Channels of a query that positions rotate, from the first."""
        return 2 * sum(self.mrope_section)

    @property
    def patches(self) -> PatchRules:
        """Sizes of patches and visual tokens."""
        return self.family.patch_rules(self.vision)

    @property
    def num_deepstack_layers(self) -> int:
        """Number of language layers, from the first, after which features of the vision tower are added."""
        return len(getattr(self.vision, "deepstack_visual_indexes", ()))

    def layer_index(self, layer: int, key: str = "loss.attention_layers") -> int:
        """Return the 0-based index of a layer.

        Args:
            layer: Index of a layer; negative numbers count from the last one.
            key: Setting that names the layer.

        Raises:
            ConfigError: there is no such layer, or it has linear attention.
        """
        index = layer + self.num_layers if layer < 0 else layer
        if not 0 <= index < self.num_layers:
            raise ConfigError(key, None, f"names layer {layer} but '{self.path}' has {self.num_layers} layers")
        if index not in self.softmax_layers:
            raise ConfigError(
                key,
                None,
                f"names layer {layer} of '{self.path}', which has linear attention and hence no attention "
                f"distribution; layers with softmax attention: {', '.join(map(str, self.softmax_layers))}",
            )
        return index

    def layer_indices(self, layers: Sequence[int], key: str = "loss.attention_layers") -> list[int]:
        """Return the 0-based indices of the layers that a setting names.

        Args:
            layers: Indices of layers; negative numbers count from the last one.
            key: Setting that names the layers.

        Raises:
            ConfigError: there is no such layer, it has linear attention, or one is named twice.
        """
        indices = [self.layer_index(layer, key) for layer in layers]
        if len(set(indices)) != len(indices):
            raise ConfigError(key, list(layers), f"names a layer of '{self.path}' twice ({self.num_layers} layers)")
        return indices

    def check_same_architecture(self, other: "ModelShape", key: str) -> None:
        """Check that another model differs in nothing but its path.

        Args:
            other: Model to compare with this one.
            key: Setting that names the other model.

        Raises:
            ConfigError: naming the first field that differs.
        """
        for item in dataclasses.fields(self):
            ours, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name == "vision":
                ours, theirs = ours.to_dict(), theirs.to_dict()
            if item.compare and item.name != "path" and ours != theirs:
                raise ConfigError(
                    key,
                    other.path,
                    f"has {item.name} = {theirs}, but '{self.path}' has {ours}; it must be a checkpoint of the same "
                    "architecture",
                )

    def check_teacher(self, teacher: "ModelShape") -> None:
        """Check that a teacher turns a picture into the same visual tokens as this model.

        Raises:
            ConfigError: naming the first value that differs.
        """
        names = {
            "patch_size": "pixels along a side of a patch",
            "temporal_patch_size": "frames of one patch",
            "spatial_merge_size": "patches along a side of one visual token",
            "tokens_per_second": "temporal positions of a second of video",
            "image_size": "pixels along the sides of a tile",
        }
        if teacher.family != self.family:
            raise ConfigError(
                "teacher.path",
                teacher.path,
                f"is a '{teacher.family.model_type}' model, but model.path = '{self.path}' is a "
                f"'{self.family.model_type}': their visual tokens differ",
            )
        for name, what in names.items():
            ours, theirs = getattr(self.vision, name, None), getattr(teacher.vision, name, None)
            if ours != theirs:
                raise ConfigError(
                    "teacher.path",
                    teacher.path,
                    f"has vision_config.{name} = {theirs} ({what}), but model.path = '{self.path}' has {ours}: their "
                    "visual tokens do not cover the same parts of a picture; distil from a teacher with the same "
                    "visual grid",
                )
        for name in ("image_token_id", "video_token_id"):
            ours, theirs = getattr(self, name), getattr(teacher, name)
            if ours != theirs:
                raise ConfigError(
                    "teacher.path",
                    teacher.path,
                    f"has {name} = {theirs}, but model.path = '{self.path}' has {ours}; distil from a teacher with the "
                    "same tokenizer",
                )

    def check_layout(self, tensor_size: int, pipeline_size: int, section: str = "parallel") -> None:
        """Check that tensor and pipeline parallelism divide this model.

        Args:
            tensor_size: Number of tensor-parallel ranks.
            pipeline_size: Number of pipeline stages.
            section: Section of the settings that has both numbers.

        Raises:
            ConfigError: naming the setting that does not fit.
        """
        key = f"{section}.tensor_model_parallel_size"
        for value, what in (
            (self.num_attention_heads, "attention heads"),
            (self.ffn_hidden_size, "feed-forward units"),
        ):
            if value % tensor_size:
                raise ConfigError(key, tensor_size, f"does not divide the {value} {what} of '{self.path}'")
        if self.num_query_groups % tensor_size and tensor_size % self.num_query_groups:
            raise ConfigError(
                key,
                tensor_size,
                f"neither divides nor is a multiple of the {self.num_query_groups} key/value heads of '{self.path}'",
            )
        linear = self.linear_attention
        if linear is not None and linear.num_key_heads % tensor_size:
            raise ConfigError(
                key,
                tensor_size,
                f"does not divide the {linear.num_key_heads} key heads of linear attention of '{self.path}'",
            )
        key = f"{section}.pipeline_model_parallel_size"
        if self.num_layers < pipeline_size:
            raise ConfigError(key, pipeline_size, f"is more than the {self.num_layers} layers of '{self.path}'")
        first = stage_sizes(self.num_layers, pipeline_size)[0]
        if first < self.num_deepstack_layers:
            raise ConfigError(
                key,
                pipeline_size,
                f"leaves {first} layers on the first stage, but features of the vision tower enter the first "
                f"{self.num_deepstack_layers} layers of '{self.path}', which must be on that stage; take fewer stages",
            )

    def padded_vocab_size(self, tensor_size: int) -> int:
        """Return the number of vocabulary rows over all tensor ranks, which is a multiple of their number.

        Padding never leaves the model: its logits are masked, and its rows are not exported.
        """
        return -(-self.vocab_size // tensor_size) * tensor_size


def read_shape(path: str, key: str = "model.path") -> ModelShape:
    """Return the shape of the model in a Hugging Face or Megatron folder.

    Args:
        path: Model folder.
        key: Setting or option that names the folder.

    Raises:
        ConfigError: there is no such folder or config.json, or the project does not know the family or a variant of it.
        CheckpointError: files of the folder were not fetched.
    """
    folder = config_folder(path)
    if not (folder / "config.json").is_file():
        found = foreign_content(path)
        remedy = "is neither a Hugging Face nor a Megatron folder (no config.json)"
        raise ConfigError(key, path, f"{remedy}: {found}" if found else remedy)
    check_fetched(folder, f"'{folder}'")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for what a config.json can hold
        reason = " ".join(str(error).split())
        raise ConfigError(key, path, f": config.json is not readable ({reason})") from None
    parts = (config, config.get_text_config())
    quantization = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            key,
            path,
            f"is quantized (config.json has a quantization_config, method {method!r}), and only floating-point "
            "weights of 16 or 32 bits can be trained; give the folder of the unquantized model",
        )
    _refuse_experts(config, key, path)
    family = find_family(config.model_type, key, path)
    text = config.text_config
    for name, value, known in family.fixed_values(config):
        if value != known:
            raise ConfigError(key, path, f": config.json has {name} = {value!r}; only {known!r} is known")
    image_token, video_token, visual_tokens = family.token_ids(config)
    return ModelShape(
        path=str(path),
        family=family,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(text.rope_parameters["rope_theta"]),
        mrope_section=family.rotary_sections(text),
        tie_word_embeddings=config.tie_word_embeddings,
        image_token_id=image_token,
        video_token_id=video_token,
        visual_token_ids=visual_tokens,
        vision=family.vision_config(config),
        linear_attention=family.linear_attention(text),
    )


def _refuse_experts(config: PretrainedConfig, key: str, path: str) -> None:
    """Raise ConfigError for a mixture of experts, which is known by the name of its type or its number of experts."""
    for part in (config, config.get_text_config()):
        if "moe" in part.model_type.split("_") or any(getattr(part, name, None) for name in _NUMBERS_OF_EXPERTS):
            raise ConfigError(
                key,
                path,
                f"is a '{config.model_type}' model with a mixture of experts, and only dense models can be trained; "
                f"take a dense model of a known family: {', '.join(FAMILIES)}",
            )

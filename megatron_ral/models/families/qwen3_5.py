"""Qwen3.5: three layers of linear attention (gated delta nets, arXiv 2412.06464) to one of softmax attention, whose
outputs are gated; positions rotate a quarter of the channels; norms are centred at zero. The vision tower is that of
Qwen3-VL without DeepStack, and pictures and videos enter the prompt as they do there.
"""

from typing import TYPE_CHECKING, Any, Iterator, cast

from megatron_ral.models.families.qwen3_vl import Qwen3VL

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megatron_ral.models.linear_attention import LinearAttentionShape


class Qwen3_5(Qwen3VL):
    """Rules of Qwen3.5."""

    def tower_class(self) -> type:
        """Return the vision tower's class in transformers."""
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

        return Qwen3_5VisionModel

    def linear_attention(self, text: "PretrainedConfig") -> "LinearAttentionShape":
        """Return the sizes of the layers with linear attention."""
        from megatron_ral.models.linear_attention import LinearAttentionShape

        of = cast(Any, text)
        layers = tuple(index for index, kind in enumerate(of.layer_types) if kind == "linear_attention")
        return LinearAttentionShape(
            layers,
            of.linear_num_key_heads,
            of.linear_num_value_heads,
            of.linear_key_head_dim,
            of.linear_value_head_dim,
            of.linear_conv_kernel_dim,
        )

    def fixed_values(self, config: "PretrainedConfig") -> Iterator[tuple[str, Any, Any]]:
        """Yield the values of the base class with both kinds of layers, and sections for the rotated channels alone."""
        text = config.text_config
        ours = "text_config.layer_types", "text_config.rope_parameters.mrope_section, summed"
        yield from (fixed for fixed in super().fixed_values(config) if fixed[0] not in ours)
        kinds = set(text.layer_types)
        yield ours[0], sorted(kinds | {"linear_attention"}), ["full_attention", "linear_attention"]
        rotated = int(text.head_dim * text.rope_parameters.get("partial_rotary_factor", 1.0))
        yield ours[1], sum(self.rotary_sections(text)), rotated // 2
        repeated = text.linear_num_value_heads % text.linear_num_key_heads
        yield "text_config.linear_num_value_heads modulo linear_num_key_heads", repeated, 0


QWEN3_5 = Qwen3_5(
    "qwen3_5",
    qkv_bias=False,
    qk_norm=True,
    interleaved_rotary=True,
    output_gate=True,
    zero_centred_norms=True,
    unused_weights=("mtp.",),
    hub_prefixes=(("model.", "model.language_model."), ("visual.", "model.visual.")),
    timed_video=True,
)

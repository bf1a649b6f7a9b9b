"""Model of one pipeline stage in megatron-core: shape, instrumented core attention, language layers, vision tower."""

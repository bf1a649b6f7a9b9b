"""megatron-core modules: group layout, instrumented core attention, the language stage, the vision tower, weights."""

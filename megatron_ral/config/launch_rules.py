"""Table of the rules about a configuration and the number of processes that run it; like `rules.py`."""

from megatron_ral.config.rule import Rule, Severity, setting

ERROR = Severity.ERROR

LAUNCH_RULES: tuple[Rule, ...] = (
    Rule(
        ERROR,
        "parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size",
        lambda a: a.world_size % a.model_ranks > 0,
        lambda a: (
            f"({a.config.parallel.tensor_model_parallel_size} * {a.config.parallel.pipeline_model_parallel_size}) does "
            f"not divide the world size {a.world_size}; start a multiple of {a.model_ranks} processes"
        ),
        lambda a: a.model_ranks,
    ),
    Rule(
        ERROR,
        "teacher.tensor_model_parallel_size * teacher.pipeline_model_parallel_size",
        lambda a: a.config.distills and a.world_size % a.teacher_ranks > 0,
        lambda a: (
            f"({a.config.teacher_layout[0]} * {a.config.teacher_layout[1]}) does not divide the world size "
            f"{a.world_size}; the teacher runs on the ranks of the policy"
        ),
        lambda a: a.teacher_ranks,
    ),
    Rule(
        ERROR,
        lambda a: a.batch_key,
        lambda a: a.training and setting(a.config, a.batch_key) % (a.data_ranks * a.updates) > 0,
        lambda a: (
            f"is not divisible by the {a.data_ranks} data-parallel ranks"
            + (" * {rollout.num_minibatches}" if a.batch_key == "rollout.num_prompts" else "")
        ),
    ),
    Rule(
        ERROR,
        "train.micro_batch_size",
        lambda a: (
            a.training
            and not a.config.train.tokens_per_micro_batch
            and a.groups_per_rank % min(a.config.train.micro_batch_size, a.groups_per_rank) > 0
        ),
        lambda a: f"does not divide the {a.groups_per_rank} prompt groups that one rank handles per optimizer step",
    ),
)
"""Rules over a configuration and a number of processes. The first one that applies is reported."""

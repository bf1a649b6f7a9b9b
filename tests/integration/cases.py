"""Whole small runs, as the entry point would make them, inside the ranks of a test."""

from megatron_ral.config import load_config
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.training.trainer import Inputs, Trainer

RL = """
seed: 1
model: {dtype: float32}
data: {max_prompt_length: 128, shuffle_buffer: 20}
rollout: {num_prompts: 8, group_size: 3, num_minibatches: 2, max_response_length: 16, temperature: 1.0}
loss: {attention_coef: 1.0, kl_coef: 0.04}
optimizer: {learning_rate: 1.0e-3}
train: {algorithm: ral, num_steps: 4, micro_batch_size: 2, checkpoint_interval: 1, keep_checkpoints: 2}
logging: {eval_interval: 2, num_eval_prompts: 10, probe_interval: 2, num_probes: 2, completions_interval: 2,
          num_completions: 2}
"""
SFT = """
seed: 1
model: {dtype: float32, train_vision: true}
data: {max_prompt_length: 128, shuffle_buffer: 20}
rollout: {max_response_length: 16}
optimizer: {learning_rate: 1.0e-3, warmup_steps: 2, decay: cosine}
train: {algorithm: sft, num_steps: 4, batch_size: 8, micro_batch_size: 2, checkpoint_interval: 1}
logging: {probe_interval: 0}
"""

SHORT_SFT = [
    "train.num_steps=80",
    "train.batch_size=16",
    "train.micro_batch_size=16",
    "optimizer.learning_rate=3.0e-3",
    "optimizer.warmup_steps=10",
    "train.checkpoint_interval=0",
]
"""Supervised training after which a tiny model answers in the format."""


def write_config(folder, text, model, data, train="search") -> str:
    """A configuration file with its paths filled in by overrides (returned as arguments of `run_training`)."""
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path), [
        f"model.path={model}",
        f"data.train=[{{shards: '{data}/{train}-*.tar'}}]",
        f"data.eval_shards={data}/heldout-*.tar",
    ]


def run_training(path: str, overrides: list[str], resume: bool = False) -> None:
    config = load_config(path, overrides)
    process_groups = start_groups(
        tensor_size=config.parallel.tensor_model_parallel_size,
        pipeline_size=config.parallel.pipeline_model_parallel_size,
        seed=config.seed,
    )
    teacher = read_shape(config.teacher.path) if config.distills else None
    Trainer(config, read_shape(config.model.path), process_groups, Inputs.open(config, resume), teacher).run()
    stop_groups()

"""Train: `torchrun ... -m megatron_ral.train --config FILE [dotted.key=value ...] [--resume] [--dry-run]`.

Arguments -> configuration -> checks that need no memory -> build -> run.
"""

import os
from pathlib import Path

from megatron_ral.cli import dry_run, fail, parse_arguments, quiet_third_parties, read_config
from megatron_ral.config import ConfigError


def _extra(parser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in train.output_dir")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and layout, and exit")


def main() -> None:
    quiet_third_parties()
    arguments = parse_arguments(__doc__, _extra)
    try:
        config = read_config(arguments)
        from megatron_ral.models.shape import read_shape

        shape = read_shape(config.model.path)
        shape.check_layout(config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size)
        for layer in config.loss.attention_layers:
            shape.layer_index(layer)
        if config.model.reference_path:
            read_shape(config.model.reference_path, "model.reference_path")
    except ConfigError as error:
        fail(error)
    if arguments.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            print(dry_run(config))
        return

    from megatron_ral.compat.cpu_backend import choose_deepspeed_accelerator

    choose_deepspeed_accelerator()
    from megatron_ral.data.loader import open_sources
    from megatron_ral.data.shards import DataError

    try:  # every path is looked at before any memory is taken
        open_sources([(source.shards, source.num_samples) for source in config.data.train], "data.train")
        if config.data.eval_shards:
            open_sources([(config.data.eval_shards, 0)], "data.eval_shards")
        Path(config.train.output_dir).mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:
        fail(error)

    from megatron_ral.models.weights import CheckpointError
    from megatron_ral.parallel.groups import start_groups, stop_groups
    from megatron_ral.training.trainer import Trainer

    groups = start_groups(tensor_size=config.parallel.tensor_model_parallel_size,
                          pipeline_size=config.parallel.pipeline_model_parallel_size, seed=config.seed,
                          timeout_minutes=config.parallel.timeout_minutes)
    try:
        Trainer(config, shape, groups).run(resume=arguments.resume)
    except (CheckpointError, ConfigError, DataError) as error:
        fail(error)
    stop_groups()


if __name__ == "__main__":
    main()

"""Answer held-out prompts with a model and print a table of accuracies.

    torchrun ... -m megatron_ral.evaluate --config FILE --model DIR --output FILE.json [--samples N]
        [dotted.key=value ...]

Each prompt gets one greedy response and, with --samples N, N sampled ones. Used of the configuration: data.eval_shards,
logging.num_eval_prompts, rollout.max_response_length (and temperature, top_p and generation_batch_size), reward.* and
parallel.*. The model is --model, or else model.path, in any layout. The table has one row per category, with standard
errors and the number of samples that could not be used. It is written to --output, and every response with the parts of
its reward to a file of JSON lines beside it.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

from megatron_ral.commands.common import (
    Arguments,
    import_libraries,
    one_sentence,
    parse_arguments,
    quiet_third_parties,
    read_config,
)
from megatron_ral.errors import ConfigError


def _options(parser) -> None:
    parser.add_argument("--model", help="model folder (default: model.path of the configuration)")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=0, help="sampled responses per prompt, beside the greedy one")
    parser.add_argument("--completions", help="file of JSON lines to write (default: --output, ending in .jsonl)")


def main(argv: Arguments = None) -> int:
    """Evaluate; wrong input ends the process with exit status 2."""
    quiet_third_parties()
    arguments = parse_arguments(__doc__ or "", _options, argv)
    with one_sentence():
        if arguments.model:  # last, so that it counts
            arguments.overrides.append(f"model.path={json.dumps(arguments.model)}")
        config = read_config(arguments, training=False)
        if arguments.samples < 0:
            raise ConfigError("--samples", arguments.samples, "must not be negative; 0 leaves sampling out")
        output = Path(arguments.output)
        completions = Path(arguments.completions) if arguments.completions else output.with_suffix(".jsonl")
        if completions == output:
            raise ConfigError("--completions", completions, "is the same file as --output; give two files")
        from megatron_ral.models.shape import read_shape

        path = config.model.path
        shape = read_shape(path, "--model" if arguments.model else "model.path")
        shape.check_layout(config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size)
        layer = max(shape.layer_indices(config.loss.attention_layers))
        if not config.data.eval_shards:
            raise ConfigError("data.eval_shards", None, "is empty; give held-out shards to evaluate on")

    import_libraries()
    from megatron_ral.data.loader import open_sources
    from megatron_ral.data.processor import PromptProcessor
    from megatron_ral.weights.conversion import check_weights, open_weights

    # the first process of each node speaks: a disk may be missing on one of them
    with one_sentence(os.environ.get("RANK", "0") == "0" or os.environ.get("LOCAL_RANK", "0") != "0"):
        source = open_sources([(config.data.eval_shards, 0)], "data.eval_shards")[0]
        processor = PromptProcessor.from_config(config, training=False)
        check_weights(open_weights(path), shape)

    from tqdm import tqdm

    from megatron_ral.data.peers import ReplicaPeers
    from megatron_ral.engine.frozen import FrozenEngine
    from megatron_ral.engine.settings import EngineSettings
    from megatron_ral.evaluation.evaluate import evaluate_prompts, sample_prompts
    from megatron_ral.evaluation.generation import EvaluationSettings
    from megatron_ral.evaluation.prompt_set import PromptSet, check_any_prompt, left_out_by_reason, warn_about_prompts
    from megatron_ral.evaluation.tables import BenchmarkTable, ResultCollector, write_completions
    from megatron_ral.parallel.process_groups import start_groups, stop_groups

    started = time.perf_counter()
    process_groups = start_groups(
        tensor_size=config.parallel.tensor_model_parallel_size,
        pipeline_size=config.parallel.pipeline_model_parallel_size,
        seed=config.seed,
        timeout_minutes=config.parallel.timeout_minutes,
    )
    is_main, layout = process_groups.layout.rank == 0, process_groups.layout
    if is_main:
        warn_about_prompts(source, config.logging.num_eval_prompts, config.reward.accuracy)
    prompts = PromptSet(
        source.shards,
        processor,
        config.logging.num_eval_prompts,
        dp_rank=layout.data_rank,
        dp_size=layout.data_size,
        num_readers=layout.world_size,
        peers=ReplicaPeers(process_groups),
    )
    with one_sentence():  # an AgreedError
        check_any_prompt(prompts, process_groups)
        engine = FrozenEngine(shape, process_groups, EngineSettings(path, config.model.dtype))
    collector, share, settings = ResultCollector(), prompts.size(source), EvaluationSettings.from_config(config)
    with one_sentence(everywhere=False):  # a reward function that does not return on one rank
        with tqdm(total=share, desc="evaluate", unit="prompt", disable=not is_main, mininterval=5.0) as bar:
            result = evaluate_prompts(engine, prompts, processor, settings, layer, bar.update, collector.add_greedy)
        if arguments.samples:
            with tqdm(total=share, desc="sample", unit="prompt", disable=not is_main, mininterval=5.0) as bar:
                sample_prompts(
                    engine, prompts, processor, settings, arguments.samples, collector.add_sampled, bar.update
                )
    results, left_out = collector.gather(process_groups), left_out_by_reason(source, prompts, process_groups)
    if is_main:
        record = {
            **dataclasses.asdict(result),
            "seconds": round(time.perf_counter() - started, 2),
            "model": path,
            "reward_accuracy": config.reward.accuracy,
            "left_out": left_out,
        }
        if arguments.samples:
            record["sampling"] = {
                "num_samples": arguments.samples,
                "temperature": config.rollout.temperature,
                "top_p": config.rollout.top_p,
                "seed": config.seed,
            }
        table = BenchmarkTable.of(results)
        record |= table.record()
        print(f"\n{table}\n", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=2))
        write_completions(completions, results)
        print(
            f"{result.num_prompts} prompts: accuracy {result.accuracy:.3f}, format {result.format_rate:.3f}, "
            f"unparsed {result.unparsed_rate:.3f}, failed {result.error_rate:.3f}, "
            f"target attention {result.target_attention:.3f}, visual mass {result.visual_mass:.3f}",
            flush=True,
        )
        if left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            print(f"left out: {sum(left_out.values())} samples that could not be used ({reasons})", flush=True)
    stop_groups()
    return 0

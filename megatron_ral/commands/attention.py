"""Write one self-contained HTML page that shows where a checkpoint attends, token by token.

    megatron-ral attention CHECKPOINT 'DIR/*.tar' [--num-samples 8] [--output report.html] [--layers -1 0]
        [--config FILE] [dotted.key=value ...]

CHECKPOINT is a model folder, exported by a run or to start one from. The project's own engine answers the first samples
of the shards greedily in one process. The page shows the picture of each sample, or frames of its video, with the
target framed, and the question, the reference answer and the response with its reward. Pointing at a token shows its
attention in the chosen layer: own token excluded, mean over heads, as in the paper. Response length, precision, reward
and prompt suffix come from --config, the file of a run, or from settings (rollout.max_response_length=64). Also `python
tools/attention_report.py`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from megatron_ral.commands.common import Arguments, command, import_libraries, quiet_third_parties
from megatron_ral.errors import DataError


def parse_arguments(argv: Arguments) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="model folder")
    parser.add_argument("shards", help="glob of shards")
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="settings that replace those of --config"
    )
    parser.add_argument("--num-samples", type=int, default=8, help="number of samples, from the first (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="page to write (default: report.html)")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[-1],
        metavar="N",
        help="layers to show, 0-based, negative from the last (default: -1)",
    )
    parser.add_argument("--config", type=Path, help="YAML file of a run")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.num_samples < 1:
        parser.error(f"--num-samples must be at least 1, got {arguments.num_samples}")
    return arguments


def read_settings(arguments: argparse.Namespace):
    """Return the configuration for one process: that of --config, or the defaults, in float32 without an
    accelerator."""
    import torch

    from megatron_ral.config import apply_overrides, load_config
    from megatron_ral.config.sections import ParallelConfig

    overrides = [*arguments.overrides, f"model.path={json.dumps(arguments.checkpoint)}"]
    if arguments.config is not None:
        config = load_config(arguments.config, overrides)
    else:
        config = apply_overrides(
            {
                "model": {"dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
                "data": {"train": [{"shards": arguments.shards}]},
            },
            overrides,
        )
    return replace(config, parallel=ParallelConfig())


@command
def main(argv: Arguments = None) -> int:
    """Write the page."""
    quiet_third_parties()
    arguments = parse_arguments(argv)
    import_libraries()
    from megatron_ral.evaluation.attention_page import page

    samples, layers = make_samples(arguments)

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        page(
            samples,
            f"Attention of {arguments.checkpoint}",
            [
                f"{arguments.shards}, greedy responses, layers {', '.join(map(str, sorted(layers)))}. Point at a token "
                "to see its attention, click to fix it. Colours run from black to white at the brightest cell of the "
                "token. Tokens are tinted by their attention mass on the target. The token in a thick frame is the one "
                "whose row predicts the first token of the answer. Both frames of a temporal patch show "
                "the mass of that patch."
            ],
        ),
        encoding="utf-8",
    )
    print(f"{len(samples)} samples in {arguments.output} ({arguments.output.stat().st_size / 2**20:.2f} MiB)")
    return 0


def make_samples(arguments: argparse.Namespace) -> tuple[list, list[int]]:
    """Run the engine; return the sections of the page and the 0-based layers."""
    from megatron_ral.data.processor import PromptProcessor
    from megatron_ral.data.shards import find_shards, reference_answer
    from megatron_ral.engine.frozen import FrozenEngine
    from megatron_ral.engine.settings import EngineSettings
    from megatron_ral.evaluation.attention_page import PageSample
    from megatron_ral.evaluation.attention_pictures import most_attended, sample_panels
    from megatron_ral.evaluation.generation import EvaluationSettings
    from megatron_ral.evaluation.probes import view_tokens
    from megatron_ral.evaluation.prompt_set import read_prompts
    from megatron_ral.models.shape import read_shape
    from megatron_ral.parallel.process_groups import start_groups, stop_groups
    from megatron_ral.weights.conversion import check_weights, open_weights

    config, shape = read_settings(arguments), read_shape(arguments.checkpoint, "CHECKPOINT")
    layers = shape.layer_indices(arguments.layers, "--layers")
    processor = PromptProcessor.from_config(config, training=False)
    prompts = read_prompts(find_shards(arguments.shards, "SHARDS"), processor, arguments.num_samples)
    if not prompts:
        raise DataError(
            "SHARDS",
            arguments.shards,
            f": none of the first {arguments.num_samples} samples can be used; the warnings above say why",
        )
    check_weights(open_weights(arguments.checkpoint), shape)
    process_groups, samples = start_groups(tensor_size=1, pipeline_size=1, seed=config.seed), []
    engine = FrozenEngine(shape, process_groups, EngineSettings(arguments.checkpoint, config.model.dtype))
    for view in view_tokens(engine, prompts, processor, EvaluationSettings.from_config(config), layers):
        sample, masses = view.prompt.sample, {layer: rows.numpy() for layer, rows in view.visual_attention.items()}
        panels = list(sample_panels(view.prompt, processor.video))
        share = cast(Any, sum(rows.mean(axis=0) for rows in masses.values()))
        shown = most_attended(panels, share)
        samples.append(
            PageSample(
                sample.key,
                sample.problem,
                reference_answer(sample.solution),
                view.text,
                view.reward,
                view.components,
                [processor.tokenizer.decode([token]) for token in view.token_ids.tolist()],
                view.deciding_token,
                masses,
                view.prompt.target_mask[view.prompt.visual_mask].numpy(),
                shown,
                len(panels),
            )
        )
    stop_groups()
    return samples, layers

"""Where a checkpoint looks, token by token, as one HTML page that needs nothing else.

    python tools/attention_report.py CHECKPOINT 'DIR/*.tar' [--num-samples 8] [--output report.html] [--layers -1 0]
        [--config FILE] [dotted.key=value ...]

CHECKPOINT is a Hugging Face folder (an exported one, or one to start from); the first samples of the shards are answered
greedily by the project's own engine in this one process. The page shows each sample's picture or the frames of its video
with the target framed, question, reference and completion with its reward; pointing at a token shows where its row looked
in the chosen layer (own token left out, heads averaged, as in the paper). Length of responses, precision, reward and what
is put behind a question come from --config (a run's file) or from settings (rollout.max_response_length=64).
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ral.commands.common import quiet_third_parties  # noqa: E402


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Hugging Face folder")
    parser.add_argument("shards", help="glob of shards")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings")
    parser.add_argument("--num-samples", type=int, default=8, help="samples, from the first (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="page to write (default: report.html)")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[-1],
        metavar="N",
        help="layers, 0-based, negative from the last (default: -1)",
    )
    parser.add_argument("--config", type=Path, help="YAML file of a run")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.num_samples < 1:
        parser.error(f"--num-samples must be at least 1, got {arguments.num_samples}")
    return arguments


def read_settings(arguments: argparse.Namespace):
    """Configuration of one process. Without a file the defaults, in float32 where there is no accelerator."""
    import torch

    from megatron_ral.config import load_config
    from megatron_ral.config.load import apply_overrides
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


def main(argv: list[str] | None = None) -> int:
    """Write the page; exit status 2 where the input cannot be used."""
    quiet_third_parties()
    arguments = parse_arguments(argv)
    from megatron_ral.compat.cpu_backend import choose_deepspeed_accelerator
    from megatron_ral.errors import CheckpointError, ConfigError, DataError

    choose_deepspeed_accelerator()
    try:
        samples, layers = make_samples(arguments)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from attention_page import page

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        page(
            samples,
            f"Attention of {arguments.checkpoint}",
            [
                f"{arguments.shards}, greedy responses, layers {', '.join(map(str, sorted(layers)))}. Point at a token to see where "
                "its row looked, click to keep it. Colours run from black to white at the brightest cell of the token; tokens are tinted by "
                "their mass on the target. Both frames of a temporal patch show that patch's mass."
            ],
        ),
        encoding="utf-8",
    )
    print(f"{len(samples)} samples in {arguments.output} ({arguments.output.stat().st_size / 2**20:.2f} MiB)")
    return 0


def make_samples(arguments: argparse.Namespace) -> tuple[list, list[int]]:
    """The sections of the page and the 0-based layers, from a run of the engine."""
    from attention_page import PageSample

    from megatron_ral.data.processor import PromptProcessor
    from megatron_ral.data.shards import find_shards, reference_answer
    from megatron_ral.errors import DataError
    from megatron_ral.engine.frozen import FrozenEngine
    from megatron_ral.models.folder import config_folder
    from megatron_ral.models.shape import read_shape
    from megatron_ral.parallel.process_groups import start_groups, stop_groups
    from megatron_ral.evaluation.attention_pictures import most_attended, sample_panels
    from megatron_ral.evaluation.generation import EvaluationSettings
    from megatron_ral.evaluation.probes import view_tokens
    from megatron_ral.evaluation.prompt_set import read_prompts

    config, shape = read_settings(arguments), read_shape(arguments.checkpoint, "CHECKPOINT")
    layers = shape.layer_indices(arguments.layers, "--layers")
    processor = PromptProcessor(
        str(config_folder(arguments.checkpoint)), config.data.max_prompt_length, prompt_suffix=config.data.prompt_suffix
    )
    prompts = read_prompts(find_shards(arguments.shards, "SHARDS"), processor, arguments.num_samples)
    if not prompts:
        raise DataError(
            f"none of the first {arguments.num_samples} samples of '{arguments.shards}' can be used; the "
            "warnings above say why"
        )
    process_groups, samples = start_groups(tensor_size=1, pipeline_size=1, seed=config.seed), []
    engine = FrozenEngine(shape, process_groups, config.model.dtype, arguments.checkpoint)
    for view in view_tokens(engine, prompts, processor, EvaluationSettings.from_config(config), layers):
        sample, masses = view.prompt.sample, {layer: rows.numpy() for layer, rows in view.visual_attention.items()}
        panels = list(sample_panels(view.prompt, processor.video))
        shown = most_attended(panels, sum(rows.mean(axis=0) for rows in masses.values()))
        samples.append(
            PageSample(
                sample.key,
                sample.problem,
                reference_answer(sample.solution),
                view.text,
                view.reward,
                view.components,
                [processor.tokenizer.decode([token]) for token in view.token_ids.tolist()],
                masses,
                view.prompt.target_mask[view.prompt.visual_mask].numpy(),
                shown,
                len(panels),
            )
        )
    stop_groups()
    return samples, layers


if __name__ == "__main__":
    sys.exit(main())

"""Whole step (rollout, old log-probabilities, update) against TRL's GRPOTrainer: same weights, pictures and cores.

    python -m tools.benchmarks.whole_step_trl [--venv DIR] [--length 32] [--rounds 2] [--steps 1] [--clock cpu]

No test runs it, because TRL is installed, with the torch and transformers of this environment, into an environment of
its own. It is made once under --venv (about a minute, 1 GB; needs a package index).

A random Qwen2.5-VL in Hugging Face format and pictures of noise are made. Both sides load the same folder in float32.
They run --steps rollouts of --prompts prompts with G responses of R tokens (no token ends a response), and as many
updates per rollout as there are prompts, with AdamW, without reference model, with a frozen vision tower, and with
recomputed activations only under --recompute. Rewards are the same and follow the text's length, so that advantages are
not 0:

    ours  `Trainer.run` with ZeRO-3 in one process, pictures read from shards by the loader, the attention term of the
          paper on the last layer (coefficient 1). Phases are its own, with the clock of --clock
    trl   GRPOTrainer without the attention term: G responses (or --trl-batch) per forward and backward pass, generation
          by transformers (vLLM needs an accelerator), attention by --attention, pictures read by the same class of
          transformers. rollout: `_generate_and_score_completions` without its pass for the old log-probabilities, which
          is timed apart; update: the rest of a step

The sides run one after the other, never at once, and each round in fresh processes. Their allocator does not return
freed memory, because page faults would be a tenth of the seconds on both sides. The first rollout of each process is
not counted. Shapes follow Qwen2.5-VL-7B at another size: feed-forward 5.3 times the width, a vocabulary of as large a
share of the work, a vision tower narrower and shallower in proportion. Memory is the peak of resident memory of the
process.

With --drawn responses end at drawn lengths, the same on both sides (a token is put in the place of another). Pictures
stay of one size, because GRPOTrainer stopped with a shape mismatch when they were of several.

With --memory no seconds are compared, but the most bytes that PyTorch's allocator gave during the last update (forward
and backward pass, on our side with the sum of gradients) above those before it. The last line is then
    ratio update_memory_trl        ours over TRL's, each per response that a pass trains on

The last lines without it:
    ratio whole_step_trl_memory    peak memory of TRL over ours
    ratio whole_step_trl           samples (responses trained on) per second, ours over TRL's
"""

import argparse
import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from tools.benchmarks.padding import RESPONSES, draw_lengths
from tools.benchmarks.step_material import REAL, SCALES, STEADY, make_scaled, versions
from tools.benchmarks.trl_side import OTHER_TOKEN, QUESTION, peak_bytes, read_lengths, run_trl, say

PROJECT = Path(__file__).resolve().parents[2]
TRL = "1.16.0"
PHASES = ("data", "rollout", "old", "update")
FLAGS = ("recompute", "drawn", "memory")


# --- inputs of both sides ---------------------------------------------------------------------------------------------


def make_small_model(model: Path, args: argparse.Namespace) -> None:
    """Make a random Qwen2.5-VL whose parts have the proportions of the 7B."""
    width = args.hidden_size
    options = {
        "hidden-size": width,
        "intermediate-size": width * 16 // 3,
        "num-layers": args.num_layers,
        "num-heads": width // 64,
        "num-kv-heads": 2,
        "vocab-size": args.vocab_size,
        "rope-theta": 10000,
        "initializer-range": 0.02,
        "vision-hidden-size": width // 3,
        "vision-depth": args.num_layers,
        "vision-intermediate-size": width * 8 // 9,
        "output": model,
    }
    subprocess.run(
        [
            sys.executable,
            str(PROJECT / "tools/make_tiny_model.py"),
            "--untied",
            *(str(part) for name, value in options.items() for part in (f"--{name}", value)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )


def make_inputs(folder: Path, args: argparse.Namespace) -> None:
    """Make model/, pictures/*.png and the same pictures as the shard data.tar."""
    import numpy as np
    import torch
    from PIL import Image

    if args.scale:
        make_scaled(folder, args.scale, args.num_layers)
    else:
        make_small_model(folder / "model", args)
    if args.drawn:
        generator = torch.Generator().manual_seed(0)
        responses = draw_lengths(args.prompts * args.group_size, RESPONSES, generator).clamp(max=args.length)
        (folder / "lengths.json").write_text(json.dumps(responses.view(args.prompts, -1).tolist()))
    rng, text = np.random.default_rng(0), {"problem": QUESTION, "solution": "<answer>7</answer>", "data_type": "image"}
    (folder / "pictures").mkdir()
    with tarfile.open(folder / "data.tar", "w") as archive:
        for number in range(args.prompts):
            stream, path = io.BytesIO(), folder / f"pictures/k{number:03d}.png"
            pixels = rng.integers(0, 255, (28 * args.rows, 28 * args.columns, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, "PNG")
            path.write_bytes(stream.getvalue())
            for name, data in ((path.name, stream.getvalue()), (f"{path.stem}.json", json.dumps(text).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


# --- in the processes that measure ------------------------------------------------------------------------------------


def run_ours(args: argparse.Namespace) -> None:
    """Train with `Trainer.run` on the folder."""
    import torch

    from megatron_ral.commands.common import import_libraries, quiet_third_parties

    torch.set_num_threads(args.threads)
    quiet_third_parties()
    import_libraries()
    from megatron_ral.config import load_config
    from megatron_ral.models.shape import read_shape
    from megatron_ral.parallel.process_groups import start_groups, stop_groups
    from megatron_ral.training import step, trainer

    clock = SimpleNamespace(perf_counter=time.perf_counter if args.clock == "wall" else time.process_time)
    step.time = trainer.time = clock  # phases time themselves with `time.perf_counter`
    reports = []

    class Timed(trainer.Trainer):
        def _log_step(self, log, report, number, bar):
            super()._log_step(log, report, number, bar)
            reports.append(report)

    folder, peaks = Path(args.folder), []
    lengths = read_lengths(folder)
    (folder / "run.yaml").write_text("model: {dtype: float32}\n")
    module = "tools.benchmarks.trl_side"
    config = load_config(
        folder / "run.yaml",
        [
            f"model.path={folder}/model",
            f"data.train=[{{shards: '{folder}/data.tar'}}]",
            "data.decode_workers=0",
            "data.shuffle=false",
            f"rollout.num_prompts={args.prompts}",
            f"rollout.num_minibatches={args.prompts}",
            f"rollout.group_size={args.group_size}",
            f"rollout.max_response_length={args.length}",
            "loss.kl_coef=0.0",
            "loss.attention_coef=1.0",
            "optimizer.learning_rate=1e-5",
            "train.micro_batch_size=1",
            f"parallel.recompute_activations={str(args.recompute).lower()}",
            f"reward.functions={{length: {{path: '{module}:length_reward', weight: 1.0}}}}",
            f"train.num_steps={args.steps + 1}",
            f"train.output_dir={folder}/run-{os.getpid()}",
            "train.export=false",
            "logging.tensorboard=false",
            "logging.gradient_ratio_interval=0",
            "logging.completions_interval=0",
            "logging.probe_interval=0",
        ],
    )
    process_groups = start_groups(tensor_size=1, pipeline_size=1, seed=0)
    inputs = trainer.Inputs.open(config, False)
    if lengths:
        end_responses(lengths, inputs.processor.end_token_id)
    else:
        inputs.processor.end_token_id = -1  # no response ends before its length
    if args.memory:
        update = step.accumulate_gradients

        def watched(*positional):
            result, peak = peak_bytes(functools.partial(update, *positional))
            peaks.append(peak)
            return result

        step.accumulate_gradients = watched
    Timed(config, read_shape(config.model.path), process_groups, inputs).run()
    groups_seen = [scored.groups for report in reports for scored in report.rollout]
    seen_lengths = sorted(
        int(length) for seen in groups_seen[-args.prompts :] for length in seen.response_lengths.flatten()
    )
    wanted = lengths or [[args.length] * args.group_size] * args.prompts
    assert seen_lengths == sorted(length for group in wanted for length in group)
    assert "loss/attention" in reports[-1].metrics
    say(
        [dict(report.seconds) for report in reports],
        prompt=groups_seen[0].prompts.input_ids.shape[1],
        response=groups_seen[0].response_ids.shape[2],
        visual=int(groups_seen[0].prompts.visual_mask.sum()),
        update_peak=peaks[-1] if peaks else 0,
    )
    stop_groups()


def end_responses(lengths: list[list[int]], end_token: int) -> None:
    """Make the sampler end every response where its length says, and nowhere else.

    Args:
        lengths: Tokens of each response, by prompt. A prompt's number is the end of its key.
        end_token: Token that ends a response.
    """
    import torch

    from megatron_ral.engine.decoding_batch import DecodingBatch

    take = DecodingBatch.take

    def ended(batch: DecodingBatch, token_N: torch.Tensor) -> None:
        wanted = torch.tensor([lengths[int(key[-3:])] for key in batch.prompts.identities]).flatten()[batch.rows]
        drawn = token_N.cpu() if batch._drawn is None else batch._drawn
        tokens = torch.where(drawn == end_token, OTHER_TOKEN, drawn)
        batch._drawn = None
        take(batch, torch.where(wanted == batch.step + 1, end_token, tokens))

    DecodingBatch.take = ended


# --- in the process that compares -------------------------------------------------------------------------------------


def other_python(folder: Path) -> str:
    """Return the Python of an environment with TRL, which is made where it is missing."""
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        print(f"making an environment for TRL {TRL} in {folder}", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        wanted = [f"{name}=={version(name)}" for name in ("torch", "transformers", "pillow")]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"trl=={TRL}", *wanted], check=True)
        (folder / "complete").touch()
    return str(python)


def child(python: str, side: str, args: argparse.Namespace) -> dict:
    """Run one process of a side, and return its report."""
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name not in ("child", *FLAGS)
    ]
    options += [f"--{name}" for name in FLAGS if getattr(args, name)]
    environment = {
        **os.environ,
        **STEADY,
        "OMP_NUM_THREADS": str(args.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": f"{args.folder}/cache",
        "PYTHONPATH": str(PROJECT),
    }
    done = subprocess.run(
        [python, __file__, "--child", side, *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd=args.folder,
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def report(args: argparse.Namespace, found: dict[str, list[dict]]) -> None:
    """Print the table of both sides and the ratios."""
    samples = args.prompts * args.group_size
    print(
        f"{'':6}{'data, s':>9}{'rollout, s':>12}{'old, s':>9}{'update, s':>11}{'step, s':>9}{'samples/s':>11}"
        f"{'peak memory, MiB':>18}"
    )
    rate, peak = {}, {}
    for side, rounds in found.items():
        steps = sorted((phases for one in rounds for phases in one["phases"]), key=lambda phases: sum(phases.values()))
        middle = steps[(len(steps) - 1) // 2]
        rate[side], peak[side] = samples / sum(middle.values()), max(one["peak"] for one in rounds)
        data, rollout, old, update = (middle.get(name, 0.0) for name in PHASES)
        print(
            f"{side:6}{data:9.2f}{rollout:12.2f}{old:9.2f}{update:11.2f}{sum(middle.values()):9.2f}{rate[side]:11.3f}"
            f"{peak[side] / 2**20:18.0f}   (steps: {' '.join(f'{sum(step.values()):.1f}' for step in steps)})"
        )
    if args.memory:
        ours, trl = (max(one["update_peak"] for one in found[side]) for side in ("ours", "trl"))
        responses = args.group_size / (args.trl_batch or args.group_size)
        print(
            f"peak of the last update above what was held before it: ours {ours / 2**20:.0f} MiB, trl {trl / 2**20:.0f}"
        )
        print(f"ratio update_memory_trl {ours / trl / responses:.3f}")
        return
    print(f"ratio whole_step_trl_memory {peak['trl'] / peak['ours']:.2f}")
    print(f"ratio whole_step_trl {rate['ours'] / rate['trl']:.2f}")


def main() -> None:
    """Make the inputs, run both sides by turns and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument(
        "--venv", type=Path, default=cache / "megatron_ral" / f"trl-{TRL}", help="folder of the environment of TRL"
    )
    parser.add_argument("--hidden-size", type=int, default=384, help="width of the language model, a multiple of 384")
    parser.add_argument("--num-layers", type=int, default=6, help="layers of language model and vision tower each")
    parser.add_argument("--vocab-size", type=int, default=3584, help="rows of the word embeddings")
    parser.add_argument("--prompts", type=int, default=2, help="prompts and updates of a rollout")
    parser.add_argument("--rows", type=int, default=32, help="visual tokens along a picture's height")
    parser.add_argument("--columns", type=int, default=32, help="visual tokens along a picture's width")
    parser.add_argument("--group-size", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--length", type=int, default=32, help="tokens of a response")
    parser.add_argument("--steps", type=int, default=1, help="rollouts of a process that count")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turns")
    parser.add_argument("--threads", type=int, default=1, help="threads of either side")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="cpu",
        help="clock of the seconds; cpu: processor seconds of all threads of the process",
    )
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="attention of TRL")
    parser.add_argument("--trl-batch", type=int, default=0, help="responses per pass of TRL; 0: a whole group")
    parser.add_argument(
        "--scale",
        type=int,
        choices=(0, *SCALES),
        default=0,
        help="widths of the 7B model / scale in place of --hidden-size",
    )
    parser.add_argument("--drawn", action="store_true", help="lengths of responses as in padding.py")
    parser.add_argument("--memory", action="store_true", help="measure memory of the last update in place of seconds")
    parser.add_argument("--recompute", action="store_true", help="recompute activations on both sides")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        {"ours": run_ours, "trl": run_trl}[args.child](args)
        return
    if args.group_size % (args.trl_batch or 1):
        parser.error(f"--trl-batch must divide --group-size = {args.group_size}, got {args.trl_batch}")
    if args.hidden_size % 384:
        parser.error(f"--hidden-size must be a multiple of 384 (a vision tower of a third), got {args.hidden_size}")
    pythons = {"ours": sys.executable, "trl": other_python(args.venv)}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        make_inputs(Path(folder), args)
        size = sum(path.stat().st_size for path in Path(folder, "model").glob("*.safetensors")) / 4e6
        found: dict[str, list[dict]] = {"ours": [], "trl": []}
        for _ in range(args.rounds):
            for side, rounds in found.items():
                rounds.append(child(pythons[side], side, args))
        first, other = found["ours"][0], found["trl"][0]
        same = ("prompt", "visual") if args.drawn else ("prompt", "visual", "response")
        assert all(first[name] == other[name] for name in same), (first, other)
        P, G, R = first["prompt"], args.group_size, args.length
        width = REAL["hidden_size"] // args.scale if args.scale else args.hidden_size
        print(
            f"Qwen2.5-VL of {args.num_layers} layers x {width}, {size:.1f} M float32 parameters; "
            f"{args.prompts} prompts and updates, P = {P} with {first['visual']} visual tokens, G = {G}, "
            + (
                f"R up to {R}, drawn"
                if args.drawn
                else f"R = {R}; token ratio G (P + R) / (P + G R) = {G * (P + R) / (P + G * R):.2f}"
            )
        )
        print(
            f"{versions()}, trl {TRL} ({args.attention}, {args.trl_batch or G} responses per pass); {args.threads} "
            f"threads, {len(os.sched_getaffinity(0))} cores; {args.clock} seconds, median step of {args.rounds} x "
            f"{args.steps}" + ", activations recomputed" * args.recompute
        )
        report(args, found)


if __name__ == "__main__":
    main()

"""Tokens per second of generating G responses to each image prompt, against `transformers.generate`.

    python -m tools.benchmarks.generation [--prompts 8] [--group-size 8] [--length 64] [--cores 1 --clock cpu]

A random Qwen2.5-VL in Hugging Face format is made, wide enough for its matrices to take the time. Three sides with the
same weights answer by turns, each in processes of its own that stay open:

    transformers   one process with --cores threads; the prompts in one batch, num_return_sequences = G
    one stage      one process with --cores threads
    two stages     two processes with half of the threads each over gloo, two batches of half of the prompts in flight;
                   left out with --cores 1

All sides sample at temperature 1 from the whole vocabulary, in float32, up to the last step: no token ends a response.
Seconds are those of a whole call, vision tower included. Seconds of decoding are those of a whole call minus those of a
call for one token. A second measurement ends every second response after a quarter of the steps. It is compared with a
batch of half the group size in which no response ends, because matrices of fewer rows are less efficient in any case.
All sides compute greedy tokens first, and the share of ours that equals those of transformers is printed. On a machine
with other work, --cores 1 --clock cpu (processor seconds of all threads, waiting ones included) is the steadier
measure.

The last lines are ratios of tokens per second:
    generation_ended         one stage: cost of a token (decoding seconds over tokens of responses) where half of the
                             responses end early, over the cost in a batch of the other half alone
    generation_two_stages    two stages over one
    generation_decoding      one stage over transformers, without the seconds of the first token
    generation               one stage over transformers, whole calls
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
END = 1
"""Token id that ends a response."""


def sides_of(cores: int) -> dict[str, tuple[int, int]]:
    """Return (processes, threads of each) of every side by name."""
    sides = {"transformers": (1, cores), "one stage": (1, cores)}
    return sides if cores == 1 else {**sides, "two stages": (2, cores // 2)}


# --- in the processes that measure ------------------------------------------------------------------------------------


def read_prompts(args: argparse.Namespace) -> tuple:
    """Return prompts of equal length about pictures of noise, and the processor that made them."""
    import numpy as np
    from PIL import Image

    from megatron_ral.data.processor import PromptProcessor
    from megatron_ral.types import Sample

    processor, rng, prompts = PromptProcessor(args.model, 16384), np.random.default_rng(0), []
    for number in range(args.prompts):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (28 * args.cells, 28 * args.cells, 3), dtype=np.uint8)).save(stream, "PNG")
        prompts.append(
            processor(
                Sample(f"k{number}", "s", "Which digit is red?", "<answer>1</answer>", "", "", (stream.getvalue(),), ())
            )
        )
    assert len({len(prompt.input_ids) for prompt in prompts}) == 1
    return prompts, processor


def open_transformers(args: argparse.Namespace):
    """Return the function answer(length, greedy, ended, group size) -> [B G, length] token ids of transformers."""
    import torch
    from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

    prompts, processor = read_prompts(args)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    parts = [processor.stock_inputs(prompt, prompt.input_ids) for prompt in prompts]
    inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    width = inputs["input_ids"].shape[1]

    class EndHalf(LogitsProcessor):
        def __call__(self, ids, scores):
            if ids.shape[1] - width == args.length // 4 - 1:
                scores[1::2] = -torch.inf
                scores[1::2, END] = 0.0
            else:
                scores[:, END] = -torch.inf
            return scores

    def answer(length: int, greedy: bool, ended: bool, group_size: int):
        how = (
            {"do_sample": False}
            if greedy
            else {"do_sample": True, "num_return_sequences": group_size, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        )
        model.generation_config.eos_token_id = END if ended else None
        extra = {"logits_processor": LogitsProcessorList([EndHalf()])} if ended else {}
        with torch.no_grad():
            return model.generate(**inputs, **how, **extra, max_new_tokens=length, pad_token_id=0)[:, width:]

    return answer


def open_stages(args: argparse.Namespace):
    """Return the function answer(length, greedy, ended, group size) -> [B G, length] token ids of this project."""
    from megatron_ral.parallel.process_groups import start_groups

    process_groups = start_groups(tensor_size=1, pipeline_size=int(os.environ["WORLD_SIZE"]), seed=0)
    from megatron_ral.engine.decoding_batch import DecodingBatch, SamplingSettings
    from megatron_ral.engine.frozen import FrozenEngine
    from megatron_ral.engine.pipelined_decoder import sample_responses
    from megatron_ral.engine.settings import EngineSettings
    from megatron_ral.models.shape import read_shape

    prompts, _ = read_prompts(args)
    engine = FrozenEngine(read_shape(args.model), process_groups, EngineSettings(args.model, "float32"))
    finish = DecodingBatch._finish

    def finish_with_ends(batch, pending):
        token = finish(batch, pending)
        if batch.step == args.length // 4 - 1:
            token = token.masked_fill(batch.rows % 2 == 1, END)
        else:
            token = token.masked_fill(token == END, END + 1)
        batch._drawn = token
        return token

    def answer(length: int, greedy: bool, ended: bool, group_size: int):
        import torch

        settings = SamplingSettings(group_size, length, END if ended else -1, 0, 0.0 if greedy else 1.0)
        DecodingBatch._finish = finish_with_ends if ended else finish
        with engine.resident():
            rows = [
                batch.response_ids.flatten(0, 1)
                for batch, _ in sample_responses(engine, prompts, settings, len(prompts))
            ]
        return torch.cat(rows)

    return answer


def child(side: str, args: argparse.Namespace) -> None:
    """Answer the requests on standard input, one JSON line each."""
    import torch

    torch.set_num_threads(sides_of(args.cores)[side][1])
    answer = (open_transformers if side == "transformers" else open_stages)(args)
    tokens = answer(min(8, args.length), True, False, 1).tolist()
    print(json.dumps({"greedy": tokens}), flush=True)
    for line in sys.stdin:
        length, ended, group_size = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        answer(length, False, ended, group_size)
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


# --- in the process that requests -------------------------------------------------------------------------------------


class Side:
    """Processes of one side."""

    def __init__(self, name: str, processes: int, threads: int, arguments: list[str], script: str = __file__):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONPATH": str(PROJECT),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, script, "--child", name, *arguments],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if os.environ.get("SHOW_ERRORS") else subprocess.DEVNULL,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(processes)
        ]

    def read(self) -> list:
        """Return the next JSON line of each of the processes."""
        found = []
        for process in self.processes:
            while True:  # libraries print too
                line = process.stdout.readline()
                if not line:
                    sys.exit("a process ended; set SHOW_ERRORS=1 to see why")
                try:
                    found.append(json.loads(line))
                    break
                except json.JSONDecodeError:
                    continue
        return found

    def ask(self, request: object) -> list:
        """Send a request as a JSON line, and return the answer of each of the processes."""
        for process in self.processes:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return self.read()

    def seconds(self, length: int, ended: bool, group_size: int, clock: str) -> float:
        """Return the seconds of one call: wall seconds until the last process is done, or processor seconds of all."""
        wall, cpu = zip(*self.ask([length, ended, group_size]))
        return max(wall) if clock == "wall" else sum(cpu)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.kill()
            process.wait()


def measure(args: argparse.Namespace, arguments: list[str]) -> tuple[dict, dict]:
    """Return the median seconds of the calls of each side, and its greedy tokens, by side.

    Calls are for one token, for all tokens, for all with half of the responses ended, and with half of the group size
    for one token and for all.
    """
    sides, rounds, greedy = {}, {name: [] for name in sides_of(args.cores)}, {}
    try:
        for name, size in sides_of(args.cores).items():
            sides[name] = Side(name, *size, arguments)
            greedy[name] = sides[name].read()[0]["greedy"]
        G, R = args.group_size, args.length
        requests = [(1, False, G), (R, False, G), (R, True, G), (1, False, G // 2), (R, False, G // 2)]
        for number in range(args.rounds + 1):  # the first is not measured; sides take turns, so that noise affects all
            for name, side in sides.items():
                row = [side.seconds(*request, args.clock) for request in requests]
                if number:
                    rounds[name].append(row)
    finally:
        for side in sides.values():
            side.close()
    middle = {name: [sorted(column)[len(column) // 2] for column in zip(*rows)] for name, rows in rounds.items()}
    return middle, greedy


def agreement(ours: list, theirs: list) -> float:
    """Return the share of equal tokens."""
    pairs = [(a, b) for mine, other in zip(ours, theirs) for a, b in zip(mine, other)]
    return sum(a == b for a, b in pairs) / len(pairs)


def report(args: argparse.Namespace, seconds: dict, greedy: dict) -> None:
    """Print the table and the ratios."""
    rows = args.prompts * args.group_size
    tokens, half = rows * args.length, rows // 2 * (args.length + args.length // 4)
    print(
        f"{'':14}{'':21}{'':14}{'':9}{'':10}{'':12}{'cost of a token in decoding, ms':>35}\n"
        f"{'':14}{'processes x threads':>21}{'one token, s':>14}{'all, s':>9}{'tokens/s':>10}{'decoding/s':>12}"
        f"{'all':>9}{'half end':>13}{'half G':>13}"
    )
    cost = {}
    for name, (first, whole, ended, half_first, half_whole) in seconds.items():
        decoding = (tokens - rows) / (whole - first)
        cost[name] = [
            1000 / decoding,
            1000 * (ended - first) / (half - rows),
            2000 * (half_whole - half_first) / (tokens - rows),
        ]
        size = "{} x {}".format(*sides_of(args.cores)[name])
        print(
            f"{name:14}{size:>21}{first:14.2f}{whole:9.2f}{tokens / whole:10.1f}{decoding:12.1f}"
            "{:9.3f}{:13.3f}{:13.3f}".format(*cost[name])
        )
    print(
        "greedy tokens that agree with transformers: "
        + ", ".join(f"{name} {agreement(greedy[name], greedy['transformers']):.3f}" for name in list(seconds)[1:])
    )
    (theirs_first, theirs), (first, ours) = seconds["transformers"][:2], seconds["one stage"][:2]
    print(f"ratio generation_ended {cost['one stage'][1] / cost['one stage'][2]:.2f}")
    if "two stages" in seconds:
        print(f"ratio generation_two_stages {ours / seconds['two stages'][1]:.2f}")
    print(f"ratio generation_decoding {(theirs - theirs_first) / (ours - first):.2f}")
    print(f"ratio generation {theirs / ours:.2f}")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of the model, its prompts and its responses to a command line."""
    parser.add_argument("--prompts", type=int, default=8, help="prompts, with one picture each")
    parser.add_argument("--group-size", type=int, default=8, help="responses to each")
    parser.add_argument("--length", type=int, default=64, help="tokens of a response; a multiple of 4")
    parser.add_argument("--cells", type=int, default=12, help="visual tokens along each side of a picture")
    parser.add_argument("--hidden-size", type=int, default=512, help="width of the language model")
    parser.add_argument("--num-layers", type=int, default=8, help="layers of the language model")
    parser.add_argument("--vocab-size", type=int, default=4096, help="rows of the word embeddings")
    parser.add_argument("--rounds", type=int, default=3, help="measurements; the median counts")
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)


def make_model(args: argparse.Namespace, model: str) -> float:
    """Make the model's folder, and return the number of its parameters in millions."""
    sizes = {
        "hidden-size": args.hidden_size,
        "intermediate-size": 3 * args.hidden_size,
        "num-layers": args.num_layers,
        "num-heads": args.hidden_size // 64,
        "vocab-size": args.vocab_size,
        "rope-theta": 10000,
        "initializer-range": 0.2,
    }
    subprocess.run(
        [
            sys.executable,
            str(PROJECT / "tools/make_tiny_model.py"),
            *(part for name, size in sizes.items() for part in (f"--{name}", str(size))),
            "--output",
            model,
            "--untied",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / 4e6


def arguments_of(args: argparse.Namespace, **changed: object) -> list[str]:
    """Return a command line with the same values, for processes that measure."""
    values = {**vars(args), **changed}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if name != "child"]


def main() -> None:
    """Make the model, measure all sides and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--cores", type=int, default=2, help="threads of every side: 1, or an even number")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="clock of the seconds")
    args = parser.parse_args()
    if args.length % 4 or args.length < 8:
        parser.error(f"--length must be a multiple of 4 and at least 8, got {args.length}")
    if args.group_size % 2:
        parser.error(f"--group-size must be even, got {args.group_size}")
    if args.cores != 1 and (args.cores < 2 or args.cores % 2):
        parser.error(f"--cores must be 1 or an even number, got {args.cores}")
    if args.child:
        child(args.child, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        size = make_model(args, model)
        print(
            f"Qwen2.5-VL of {args.num_layers} layers x {args.hidden_size}, vocabulary {args.vocab_size}, "
            f"{size:.1f} M float32 parameters; {args.prompts} prompts with {args.cells**2} visual tokens, "
            f"G = {args.group_size}, R = {args.length}"
        )
        print(
            ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "megatron-core", "deepspeed"))
            + f"; {len(os.sched_getaffinity(0))} cores; {args.clock} seconds, median of {args.rounds}"
        )
        report(args, *measure(args, arguments_of(args, model=model)))


if __name__ == "__main__":
    main()

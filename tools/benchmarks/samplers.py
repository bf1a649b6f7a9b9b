"""Tokens per second and memory of both samplers: the native one and vLLM, one thread each.

    VLLM_PYTHON=.venv-vllm/bin/python python -m tools.benchmarks.samplers [--prompts 8] [--group-size 8] [--length 64]

A random Qwen2.5-VL in Hugging Face format is made, and three sides with its weights answer the same requests by turns:

    native    the engine that trains, in one process
    modules   the same without the step that it has on the CPU (`models/host_decoding.py`), with the modules' own
    vllm      the server of `rollout.sampler = vllm` with the weights pushed to it, and the process that asks it

Prompts are about a picture, or are texts of about as many tokens. All sides sample at temperature 1 from the whole
vocabulary, in float32, with the same forbidden tokens, and no token ends a response. Before each request an empty push,
which is not measured, makes the server forget what it knows of the prompts, as every update of the weights does.

One thread: OMP_NUM_THREADS, MKL_NUM_THREADS and torch's threads are 1 on all sides, and VLLM_CPU_OMP_THREADS_BIND is
`nobind`, so that vLLM neither chooses a number of threads nor a processor of its own. The share of the processor
seconds that the busiest thread of the sampling process took during requests is printed.

Seconds are wall seconds and processor seconds of all processes of a side; the processor seconds count. Seconds of
decoding are those of a whole request minus those of a request for one token. Memory is the peak of resident memory.
Once a side is ready it holds its weights; mapped files are mostly code; the rest up to the peak came with the requests.
Memory of the training process, which has weights of its own, is not counted for vLLM. It is needed beside a server.

The last lines are ratios:
    samplers_decoding_KIND   tokens per second of decoding, native over vLLM, prompts of that kind
    samplers_KIND            the same of whole requests
    samplers_step_KIND       tokens per second of decoding, native over modules
    samplers_memory          peak memory, vLLM's server over native
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tools.benchmarks.generation import PROJECT, Side, add_sizes, arguments_of, make_model, read_prompts

KINDS = ("pictures", "texts")
SIDES = ("native", "modules", "vllm")
_MIB = 2**20


# --- in the processes that measure ------------------------------------------------------------------------------------


def processes_below(pid: int) -> list[int]:
    """Return a process and all that it has started, directly or not."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended
            continue
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found


def processor_seconds(pid: int) -> float:
    """Return the processor seconds of a process and all that it has started, all threads."""
    total = 0
    for each in processes_below(pid):
        total += sum(map(int, Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def ticks_of_threads(pid: int) -> Counter[str]:
    """Return the processor time of each thread of a process, by number of the thread."""
    found: Counter[str] = Counter()
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        found[path.parent.name] = sum(map(int, path.read_text().rsplit(")", 1)[1].split()[11:13]))
    return found


def memory(pid: int) -> dict[str, float]:
    """Return resident memory of a process in MiB: now, its peak, and the part of now that is mapped files."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    names = {"now": "VmRSS", "peak": "VmHWM", "files": "RssFile"}
    return {name: int(lines[field].split()[0]) / 1024 for name, field in names.items()}


def prompts_of(args: argparse.Namespace) -> tuple[dict, object]:
    """Return prompts by kind, and the processor that made them. Every text has other words from its start."""
    from megatron_ral.types import Sample

    pictures, processor = read_prompts(args)
    words, texts = ["which", "digit", "is", "red", "and", "where", "do", "you", "see", "it"], []
    for number in range(args.prompts):
        for length in range(8, 16384, 8):
            text = " ".join(words[(number + place * (number + 1)) % len(words)] for place in range(length))
            prompt = processor(Sample(f"t{number}", "s", f"{number} {text}?", "<answer>1</answer>", "", "", (), ()))
            if len(prompt.input_ids) >= len(pictures[0].input_ids):
                break
        texts.append(prompt)
    return {"pictures": pictures, "texts": texts}, processor


def settings_of(length: int, group_size: int, shape):
    """Return the settings of the draws. A token that is never drawn ends responses, so that none does."""
    from megatron_ral.engine.decoding_batch import SamplingSettings

    return SamplingSettings(group_size, length, shape.visual_token_ids[0], 0)


def open_native(args: argparse.Namespace, has_own_step: bool):
    """Return (answer(kind, length, group size) -> log-probabilities of all tokens, prepare(), process that samples)."""
    from megatron_ral.parallel.process_groups import start_groups

    process_groups = start_groups(tensor_size=1, pipeline_size=1, seed=0)
    from megatron_ral.engine.decoding_batch import DecodingBatch
    from megatron_ral.engine.frozen import FrozenEngine
    from megatron_ral.engine.pipelined_decoder import sample_responses
    from megatron_ral.engine.settings import EngineSettings
    from megatron_ral.models.shape import read_shape

    if not has_own_step:
        DecodingBatch.is_on_host = property(lambda batch: False)
    prompts, _ = prompts_of(args)
    engine = FrozenEngine(read_shape(args.model), process_groups, EngineSettings(args.model, "float32"))

    def answer(kind: str, length: int, group_size: int) -> list[float]:
        settings = settings_of(length, group_size, engine.shape)
        with engine.resident():
            batches = list(sample_responses(engine, prompts[kind], settings, args.prompts, 0))
        return [value for batch, _ in batches for value in batch.rollout_logprobs.flatten().tolist()]

    return answer, lambda: None, os.getpid()


def open_vllm(args: argparse.Namespace):
    """Return the same for a server, to which the folder's weights are pushed."""
    from safetensors import safe_open

    from megatron_ral.models.shape import read_shape
    from megatron_ral.rollout.served.client import SamplerClient, ServerProgram
    from megatron_ral.rollout.served.conversion import sampling_request

    prompts, processor = prompts_of(args)
    shape, image = read_shape(args.model), processor.image_processor
    pixels = tuple(image.image_mean), tuple(image.image_std)
    longest = max(len(prompt.input_ids) for row in prompts.values() for prompt in row)
    options = {
        "model": args.model,
        "dtype": "float32",
        "max_length": longest + args.length,
        "max_sequences": args.prompts * args.group_size,
        "temperature": 1.0,
        "memory_share": 0.01,
    }
    client = SamplerClient(
        ServerProgram(
            args.python,
            os.path.abspath(args.engine),
            options,
            Path(args.model).parent / "server.log",
            600.0,
            {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        )
    )
    client.start()
    pushes = 0

    def push(whole: bool) -> None:
        nonlocal pushes
        pushes += 1
        under_way = client.push(pushes, whole, 16 * _MIB)
        for path in sorted(Path(args.model).glob("*.safetensors")) if whole else ():
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    under_way.add(name, file.get_tensor(name))
        under_way.finish()

    def answer(kind: str, length: int, group_size: int) -> list[float]:
        settings, found = settings_of(length, group_size, shape), []
        request = sampling_request(prompts[kind], settings, (0,), shape.visual_token_ids, pixels)
        client.sample(request, pushes, 3600.0, lambda number, group: found.extend(group.logprobs.tolist()))
        return found

    push(whole=True)
    return answer, lambda: push(whole=False), client.pid


def child(side: str, args: argparse.Namespace) -> None:
    """Answer the requests on standard input, one JSON line each."""
    import torch

    torch.set_num_threads(1)
    answer, prepare, sampler = open_vllm(args) if side == "vllm" else open_native(args, side == "native")
    print(json.dumps({"ready": memory(sampler)}), flush=True)
    used: Counter[str] = Counter()
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            busiest = max(used.values()) / max(used.total(), 1)
            print(json.dumps({"memory": memory(sampler), "busiest": busiest}), flush=True)
            continue
        prepare()
        threads, cpu, wall = ticks_of_threads(sampler), processor_seconds(os.getpid()), time.perf_counter()
        logprobs = answer(*request)
        wall, cpu = time.perf_counter() - wall, processor_seconds(os.getpid()) - cpu
        used += ticks_of_threads(sampler) - threads
        print(json.dumps([wall, cpu, len(logprobs), statistics.fmean(logprobs)]), flush=True)


# --- in the process that requests -------------------------------------------------------------------------------------


class Requests:
    """Measurements of one side: request -> rows of (wall seconds, processor seconds, tokens, mean log-probability)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], list[list[float]]] = {}

    def add(self, kind: str, length: int, row: list[float]) -> None:
        """Add a measurement."""
        self.rows.setdefault((kind, length), []).append(row)

    def median(self, kind: str, length: int, column: int) -> float:
        """Return the median of a column."""
        return statistics.median(row[column] for row in self.rows[kind, length])

    def rates(self, kind: str, length: int, column: int) -> tuple[float, float]:
        """Return tokens per second of whole requests and of decoding alone, by the clock of a column."""
        seconds, tokens = (self.median(kind, length, part) for part in (column, 2))
        first, first_tokens = (self.median(kind, 1, part) for part in (column, 2))
        return tokens / seconds, (tokens - first_tokens) / (seconds - first)


def measure(args: argparse.Namespace, arguments: list[str]) -> tuple[dict, dict]:
    """Return the measurements of each side, and its memory when it was ready and at the end, by side."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    sides, found, memories = {}, {name: Requests() for name in SIDES}, {}
    try:
        for name in found:
            sides[name] = Side(name, 1, 1, arguments, script=__file__)
            [memories[name]] = sides[name].read()
        for number in range(args.rounds + 1):  # the first is not measured; sides take turns, so that noise affects all
            for kind in KINDS:
                for length in (1, args.length):
                    for name, side in sides.items():
                        [row] = side.ask([kind, length, args.group_size])
                        if number:
                            found[name].add(kind, length, row)
        for name, side in sides.items():
            memories[name].update(side.ask(None)[0])
    finally:
        for side in sides.values():
            side.close()
    return found, memories


def report(args: argparse.Namespace, found: dict, memories: dict, weights: float) -> None:
    """Print the tables and the ratios. `weights` are those of the model in MiB."""
    processor = {}
    print(
        f"{'':10}{'':10}{'processor seconds':>37}{'wall seconds':>22}\n"
        f"{'':10}{'':10}{'one token, s':>13}{'all, s':>8}{'tokens/s':>10}{'decoding/s':>11}"
        f"{'tokens/s':>10}{'decoding/s':>11}{'mean logprob':>14}"
    )
    for kind in KINDS:
        for name, requests in found.items():
            processor[name, kind], wall = (requests.rates(kind, args.length, column) for column in (1, 0))
            first, whole = (requests.median(kind, length, 1) for length in (1, args.length))
            print(
                f"{name:10}{kind:10}{first:13.2f}{whole:8.2f}{processor[name, kind][0]:10.0f}"
                f"{processor[name, kind][1]:11.0f}{wall[0]:10.0f}{wall[1]:11.0f}"
                f"{requests.median(kind, args.length, 3):14.4f}"
            )
    print(
        f"\nresident memory of the sampling process, MiB (weights are {weights:.0f})\n"
        f"{'':10}{'ready':>8}{'of it mapped files':>20}{'peak':>8}{'peak over ready':>17}"
        f"{'share of the busiest thread':>29}"
    )
    for name, row in memories.items():
        ready, peak = row["ready"], row["memory"]["peak"]
        print(
            f"{name:10}{ready['now']:8.0f}{ready['files']:20.0f}{peak:8.0f}{peak - ready['now']:17.0f}"
            f"{row['busiest']:29.3f}"
        )
    for kind in KINDS:
        (ours, ours_decoding), (theirs, theirs_decoding) = processor["native", kind], processor["vllm", kind]
        print(f"ratio samplers_decoding_{kind} {ours_decoding / theirs_decoding:.2f}")
        print(f"ratio samplers_{kind} {ours / theirs:.2f}")
        print(f"ratio samplers_step_{kind} {ours_decoding / processor['modules', kind][1]:.2f}")
    print(f"ratio samplers_memory {memories['vllm']['memory']['peak'] / memories['native']['memory']['peak']:.2f}")


def main() -> None:
    """Make the model, measure all sides and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_sizes(parser)
    own = PROJECT / ".venv-vllm" / "bin" / "python"
    parser.add_argument(
        "--python", default=os.environ.get("VLLM_PYTHON", str(own)), help="interpreter of the server's environment"
    )
    engine = PROJECT / "megatron_ral/rollout/served/vllm_engine.py"
    parser.add_argument("--engine", default=str(engine), help="Python file with the engine of the server")
    args = parser.parse_args()
    if args.length < 2:
        parser.error(f"--length must be at least 2, got {args.length}")
    if not os.access(args.python, os.X_OK):
        parser.error(f"--python: {args.python} is no interpreter; make one with launch_scripts/setup_vllm.sh")
    if args.child:
        child(args.child, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        size = make_model(args, model)
        print(
            f"Qwen2.5-VL of {args.num_layers} layers x {args.hidden_size}, vocabulary {args.vocab_size}, "
            f"{size:.1f} M float32 parameters; {args.prompts} prompts with {args.cells**2} visual tokens or texts as "
            f"long, G = {args.group_size}, R = {args.length}"
        )
        print(f"torch {version('torch')}; {len(os.sched_getaffinity(0))} cores; median of {args.rounds}")
        report(args, *measure(args, arguments_of(args, model=model)), size * 4e6 / _MIB)


if __name__ == "__main__":
    main()

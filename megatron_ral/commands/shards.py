"""Make WebDataset shards from records, and indexes of shards.

    megatron-ral shards make --input train.json --media DIR --output DIR --model HF_DIR [--config RUN.yaml]
    megatron-ral shards make --hf-dataset DIR --split train --output DIR --model HF_DIR
    megatron-ral shards index 'DIR/*.tar' --model HF_DIR [--config RUN.yaml] [--force]

An index holds the place of each sample in its shard and the length of its prompt, for the tokenizer and processor of
--model and the data.prompt_suffix of --config. With it a run can filter by length, and batch samples of similar length,
without decoding them. `shards make` writes shards with their indexes; `shards index` writes those that are missing,
stale or made for another model. Also `python tools/make_shards.py` and `python tools/index_shards.py`.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_ral.commands.common import Arguments, add_prompt_suffix, command, prompt_suffix
from megatron_ral.data.archive import scan_archive
from megatron_ral.data.index import index_of_scan, open_index, write_index
from megatron_ral.data.issues import REASONS, SampleError, printable
from megatron_ral.data.records import SUFFIXES, is_saved_dataset, saved_split, source_files
from megatron_ral.data.shard_maker import REJECTS, ShardSettings, make_dataset
from megatron_ral.data.shards import find_shards, parse_sample, read_entry
from megatron_ral.errors import ConfigError, DataError

MAKE = """Make WebDataset shards and their indexes from JSON, JSONL or parquet files and a folder of media.

    megatron-ral shards make --input train.json --media DIR --output DIR --model HF_DIR [--config RUN.yaml]
    megatron-ral shards make --hf-dataset DIR --split train --output DIR --model HF_DIR

The layout of records is recognised by their fields: chat `messages`, Video-R1, LLaVA and ShareGPT `conversations`,
verl, TRL, ms-swift, alpaca, or the questions of benchmarks (megatron_ral/data/layouts). Every sample is decoded once
and made into a prompt by the real processor of --model. Samples that cannot be used are listed in `rejects.jsonl` with
their key and the reason. Shard k holds the usable samples of records k * --shard-size onwards, so that workers share
nothing. A run that was killed continues when it is started again with the same arguments: finished shards are reused,
and the result equals that of one run. Media paths must stay inside --media. Media inside the records (bytes, data:
URLs, base64 text) are read, and other URLs are refused."""
INDEX = """Write the index beside each shard that has none, a stale one, or one made for another model.

    megatron-ral shards index 'DIR/*.tar' --model HF_DIR [--config RUN.yaml] [--force]

Nothing is decoded: lengths come from the sizes of pictures and the packets of videos."""
MODEL = "Hugging Face folder whose tokenizer and processor make the prompts"


def main(argv: Arguments = None) -> int:
    """Run `make` or `index`."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("make", "index"):
        sys.argv[0] += f" {name}"  # argparse shows it
        return make(rest) if name == "make" else index(rest)
    asked = name in ("-h", "--help")
    print(__doc__, file=sys.stdout if asked else sys.stderr)
    if not asked:
        print(f"error: '{name}' is neither make nor index" if name else "error: give make or index", file=sys.stderr)
    return 0 if asked else 2


def make_arguments(argv: Arguments) -> argparse.Namespace:
    """Parse and check the command line of `make`. Every error names the option and its value."""
    parser = argparse.ArgumentParser(description=MAKE, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help=".json, .jsonl or .parquet file of records, or a folder of them")
    source.add_argument("--hf-dataset", type=Path, help="folder of a Hugging Face data set, written by save_to_disk")
    parser.add_argument("--split", default="", help="split of --hf-dataset, where it has several")
    parser.add_argument("--media", type=Path, help="folder that paths in the records are relative to, if there are any")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; an unfinished one is continued")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--shard-size", type=int, default=512, help="records per shard (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="number of processes (default: %(default)s)"
    )
    add_prompt_suffix(parser)
    parser.add_argument(
        "--keys",
        choices=("id", "number"),
        default="id",
        help="keys of samples: the records' ids where they have one, or their numbers (default: %(default)s)",
    )
    parser.add_argument(
        "--max-prompt-length",
        type=int,
        default=0,
        help="longest prompt to accept, in tokens; 0 accepts all, because a run filters too (default: %(default)s)",
    )
    parser.add_argument(
        "--max-visual-tokens",
        type=int,
        default=0,
        help="most visual tokens to accept in a prompt; 0 accepts all (default: %(default)s)",
    )
    parser.add_argument("--problem-type", default="", help="problem type of records that name none (docs: rewards)")
    parser.add_argument(
        "--category", default="", help="category of records that name none, for the table of an evaluation"
    )
    parser.add_argument(
        "--group-field",
        default="",
        help="field shared by questions that are scored together (MME: question_id, with --keys number)",
    )
    args = parser.parse_args(argv)
    try:
        args.prompt_suffix = prompt_suffix(args)
    except ConfigError as error:
        parser.error(f"--config: {error}")
    try:
        args.input = _source(args)
    except DataError as error:
        parser.error(str(error))
    if args.media is not None and not args.media.is_dir():
        parser.error(f"--media {args.media} is not a folder")
    for name in ("shard_size", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("max_prompt_length", "max_visual_tokens"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    return args


def _source(args: argparse.Namespace) -> Path:
    """Return the file or folder that the records are read from.

    Raises:
        DataError: it is none, or of another kind than the option says.
    """
    if args.hf_dataset is not None:
        found = saved_split(args.hf_dataset, args.split)
    elif args.split:
        raise DataError("--split", args.split, "is a split of --hf-dataset, which is not given")
    elif args.input.is_dir() and is_saved_dataset(args.input):
        raise DataError("--input", args.input, "is a saved Hugging Face data set; give it as --hf-dataset")
    elif not args.input.exists():
        raise DataError("--input", None, f"{args.input} does not exist")
    elif not args.input.is_dir() and (args.input.suffix not in SUFFIXES or not args.input.is_file()):
        raise DataError("--input", None, f"{args.input} is not a .json, .jsonl or .parquet file")
    else:
        found = args.input
    source_files(found)
    return found


@command
def make(argv: Arguments = None) -> int:
    """Make shards, or continue an unfinished folder."""
    args = make_arguments(argv)
    from megatron_ral.data.processor import PromptProcessor

    PromptProcessor(args.model, 1)  # a wrong folder is one sentence here, and a broken pool in the workers
    summary = make_dataset(
        ShardSettings(
            input=args.input,
            media=args.media and args.media.resolve(),
            output=args.output,
            model=args.model,
            shard_size=args.shard_size,
            keys=args.keys,
            prompt_suffix=args.prompt_suffix,
            max_prompt_length=args.max_prompt_length,
            max_visual_tokens=args.max_visual_tokens,
            problem_type=args.problem_type,
            category=args.category,
            group_field=args.group_field,
        ),
        args.workers,
    )
    print(
        f"{summary['num_samples']} samples in {summary['num_shards']} shards, {summary['num_rejects']} rejected "
        f"({args.output / REJECTS})"
    )
    for reason, count in summary["rejects"].items():
        print(f"  {count:6d} {reason}: {REASONS[reason]}")
    return 0


def index_shard(shard: str, processor) -> tuple[int, list[str]]:
    """Write the index of one shard; return its number of samples, and one text per sample without lengths."""
    scan, lengths = scan_archive(shard), {}
    index, problems = index_of_scan(shard, scan), [fault.text for span in scan.spans if (fault := span.fault)]
    for number, key in enumerate(index.keys):
        if number not in index.faults:
            try:
                lengths[key] = processor.lengths(parse_sample(read_entry(index, number)))
            except SampleError as error:
                problems.append(str(error))
            except Exception as error:  # as in the loader: one bad sample must not end the work
                problems.append(f"sample '{printable(key)}': {type(error).__name__}: {error}")
    write_index(shard, scan, lengths, processor.fingerprint())
    return len(index), ([scan.damage] if scan.damage else []) + problems


@command
def index(argv: Arguments = None) -> int:
    """Write the missing and stale indexes of the shards of a glob."""
    from tqdm import tqdm

    from megatron_ral.data.processor import PromptProcessor

    parser = argparse.ArgumentParser(description=INDEX, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="glob of shards (tar files)")
    parser.add_argument("--model", required=True, help=MODEL)
    add_prompt_suffix(parser)
    parser.add_argument("--force", action="store_true", help="write every index again")
    args = parser.parse_args(argv)
    shards = find_shards(args.shards, "shards")
    processor = PromptProcessor(args.model, 1, prompt_suffix=prompt_suffix(args))
    fingerprint, written, samples, problems = processor.fingerprint(), 0, 0, 0
    for shard in tqdm(shards, unit="shard", desc="index", mininterval=1.0):
        found = open_index(shard)
        if args.force or found.note or found.fingerprint != fingerprint:
            count, texts = index_shard(shard, processor)
            written, samples, problems = written + 1, samples + count, problems + len(texts)
            for text in texts:
                print(f"{Path(shard).name}: {text}", file=sys.stderr)
    print(f"{written} of {len(shards)} shards indexed: {samples} samples, {problems} problems")
    return 0

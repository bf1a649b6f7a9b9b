"""Write the index beside each shard that has none, a stale one, or one made for another model.

    python tools/index_shards.py 'DIR/*.tar' --model HF_DIR [--config RUN.yaml] [--force]

An index holds where each sample lies and how long its prompt is for the tokenizer and processor of --model and the
data.prompt_suffix of --config, so that a run can filter by length, and make batches of similar length, without decoding.
Nothing is decoded here either: lengths come from the sizes of pictures and the packets of videos.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ral.commands.common import add_prompt_suffix, prompt_suffix
from megatron_ral.errors import ConfigError, DataError
from megatron_ral.data.archive import scan_archive
from megatron_ral.data.issues import SampleError, printable
from megatron_ral.data.index import index_of_scan, open_index, write_index
from megatron_ral.data.shards import find_shards, parse_sample, read_entry


def index_shard(shard: str, processor) -> tuple[int, list[str]]:
    """Write the index of one shard; returns its number of samples and why some have no lengths."""
    scan, lengths = scan_archive(shard), {}
    index, problems = index_of_scan(shard, scan), [fault.text for span in scan.spans if (fault := span.fault)]
    for number, key in enumerate(index.keys):
        if number not in index.faults:
            try:
                lengths[key] = processor.lengths(parse_sample(read_entry(index, number)))
            except SampleError as error:
                problems.append(str(error))
            except Exception as error:  # as in the loader: one sample must not end the work
                problems.append(f"sample '{printable(key)}': {type(error).__name__}: {error}")
    write_index(shard, scan, lengths, processor.fingerprint())
    return len(index), ([scan.damage] if scan.damage else []) + problems


def main(argv: list[str] | None = None) -> int:
    """Index the shards of a glob."""
    from tqdm import tqdm

    from megatron_ral.data.processor import PromptProcessor

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shards", help="glob of tar files")
    parser.add_argument(
        "--model", required=True, help="Hugging Face folder whose tokenizer and processor make the prompts"
    )
    add_prompt_suffix(parser)
    parser.add_argument("--force", action="store_true", help="write every index anew")
    args = parser.parse_args(argv)
    try:
        shards, processor = (
            find_shards(args.shards, "shards"),
            PromptProcessor(args.model, 1, prompt_suffix=prompt_suffix(args)),
        )
        fingerprint, written, samples, problems = processor.fingerprint(), 0, 0, 0
        for shard in tqdm(shards, unit="shard", desc="index", mininterval=1.0):
            index = open_index(shard)
            if args.force or index.note or index.fingerprint != fingerprint:
                count, found = index_shard(shard, processor)
                written, samples, problems = written + 1, samples + count, problems + len(found)
                for text in found:
                    print(f"{Path(shard).name}: {text}", file=sys.stderr)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{written} of {len(shards)} shards indexed: {samples} samples, {problems} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())

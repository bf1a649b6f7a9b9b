"""`megatron_ral.evaluate` with scripted responses: python FILE RESPONSES.json [arguments of evaluate].

The model generates as always. Its texts are replaced by those of a JSON object (key of a sample -> response) where they
are scored, so that everything from the shard to the table and the completions runs.
"""

import json
import sys
from pathlib import Path

from megatron_ral import evaluate
from megatron_ral.rollout import scoring


def main(responses: str, *arguments: str) -> int:
    texts = json.loads(Path(responses).read_text(encoding="utf-8"))
    scoring.decode_responses = lambda batch, processor: tuple(
        tuple(texts[prompt.sample.key] for _ in group)
        for prompt, group in zip(batch.prompts.prompts, batch.response_ids)
    )
    return evaluate.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

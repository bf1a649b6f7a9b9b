"""Training in which the embedding of one token becomes NaN after the weights were read.

`tests.faults.damage` is given to `run_job` as a module; its first argument is the token, the others are those of
`megatron_ral.train`. A model folder with a NaN would be refused before the run.
"""

import sys

import torch

from megatron_ral.engine import stage
from megatron_ral.weights.stage_weights import load_stage


def main() -> int:
    """Train; return the exit status."""
    token = int(sys.argv.pop(1))

    def load_and_damage(built: stage.MultimodalStage, *arguments) -> None:
        load_stage(built, *arguments)
        if built.layout.pipeline_rank == 0:
            with torch.no_grad():
                dict(built.named_parameters())["language.embedding.word_embeddings.weight"][token] = torch.nan

    stage.load_stage = load_and_damage
    from megatron_ral import train

    return train.main()

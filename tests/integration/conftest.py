"""A checkpoint that answers in the right form, so that rewards differ and every term of RL has something to act on."""

import pytest

from tests.conftest import made_once
from tests.distributed.runner import run_ranks
from tests.integration.cases import SFT, run_training, write_config


@pytest.fixture(scope="session")
def trained_model(material, request):
    """Hugging Face folder, shared by all workers: read, never written."""

    def make(folder):
        path, overrides = write_config(folder, SFT, material["root"] / "tiny", material["data"], "search")
        run_ranks(
            1,
            run_training,
            path,
            overrides
            + [
                f"train.output_dir={folder}/run",
                "train.num_steps=80",
                "train.batch_size=16",
                "train.micro_batch_size=16",
                "optimizer.learning_rate=3.0e-3",
                "optimizer.warmup_steps=10",
                "train.checkpoint_interval=0",
            ],
        )

    return made_once(request, "answering", make) / "run" / "hf"

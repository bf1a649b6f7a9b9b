"""A checkpoint that answers in the right form, so that rewards differ and every term of RL has something to act on."""

import pytest

from tests.conftest import made_once
from tests.distributed.runner import run_ranks
from tests.integration.cases import SFT, SHORT_SFT, run_training, write_config


@pytest.fixture(scope="session")
def trained_model(material, request):
    """Hugging Face folder, shared by all workers: read, never written."""

    def make(folder):
        path, overrides = write_config(folder, SFT, material["root"] / "tiny", material["data"], "search")
        run_ranks(
            1,
            run_training,
            path,
            [*overrides, *SHORT_SFT, f"train.output_dir={folder}/run"],
        )

    return made_once(request, "answering", make) / "run" / "hf"

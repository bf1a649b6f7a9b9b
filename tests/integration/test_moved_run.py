"""A run whose model folder and shards have moved goes on as the undisturbed one does."""

import shutil

import torch

from tests.distributed.runner import run_ranks
from tests.integration.cases import SFT, run_training, write_config
from tests.integration.test_runs import exported

SETTINGS = ["train.num_steps=2", "logging.eval_interval=0", "data.decode_workers=0"]


def test_a_moved_run_equals_the_undisturbed_one_bit_for_bit(material, tmp_path):
    def inputs(model, data):
        path, overrides = write_config(tmp_path, SFT, tmp_path / model, tmp_path / data)
        return path, [*overrides, *SETTINGS]

    shutil.copytree(material["tiny"], tmp_path / "model")
    shutil.copytree(material["data"], tmp_path / "data")
    path, overrides = inputs("model", "data")
    run_ranks(1, run_training, path, [*overrides, f"train.output_dir={tmp_path}/straight"])
    run_ranks(1, run_training, path, [*overrides, f"train.output_dir={tmp_path}/cut", "train.stop_after_step=1"])
    (tmp_path / "model").rename(tmp_path / "moved_model")
    (tmp_path / "data").rename(tmp_path / "moved_data")
    path, overrides = inputs("moved_model", "moved_data")
    run_ranks(1, run_training, path, [*overrides, f"train.output_dir={tmp_path}/cut"], True)
    straight, resumed = exported(tmp_path / "straight"), exported(tmp_path / "cut")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())

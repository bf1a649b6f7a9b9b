"""Prompts as a sampler's server gets them: the bytes of pictures, the seeds of responses, and what is refused."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ral.config import RunConfig
from megatron_ral.config.sampler import VllmConfig
from megatron_ral.config.sections import ModelConfig, RolloutConfig
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.errors import ConfigError
from megatron_ral.functional.patches import check_levels, image_levels
from megatron_ral.functional.sampling import stream_seed, uniform_stream
from megatron_ral.models.shape import read_shape
from megatron_ral.rollout.served.conversion import response_batch, sampling_request
from megatron_ral.rollout.served.request import SampledGroup
from megatron_ral.rollout.served.settings import check_sampler_from_config, check_served
from megatron_ral.rollout.views import view_of
from megatron_ral.types import FramePictures, Sample, pad_prompts

SAMPLING = SamplingSettings(2, 5, end_token_id=3, pad_token_id=0)


@pytest.fixture(scope="module")
def processor(material) -> PromptProcessor:
    return PromptProcessor(str(material["tiny"]), 4096)


def picture(seed: int, side: int = 60) -> bytes:
    """Noise, so that every byte occurs."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 20, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def prompt(processor, images=(), videos=()):
    return processor(Sample("key", "shard", "Which?", "", "", "", tuple(images), (), tuple(videos)))


def normalised(patches: torch.Tensor, processor) -> torch.Tensor:
    """What transformers' image processor makes of bytes."""
    image = processor.image_processor
    mean, std = (torch.tensor(part)[:, None] for part in (image.image_mean, image.image_std))
    values = (patches.view(len(patches), 3, -1).double() * image.rescale_factor).float()
    return ((values - mean) / std).view(len(patches), -1)


def bytes_of(prompt) -> torch.Tensor:
    return torch.cat([part.ordered_bytes for part in prompt.patches])


def test_bytes_of_patches_are_those_that_the_image_processor_normalises(processor):
    whole = prompt(processor, [picture(1), picture(2, 33)])
    found = bytes_of(whole)
    assert found.dtype == torch.uint8 and len(found.unique()) == 256
    assert torch.equal(normalised(found, processor), whole.pixel_values), "bit for bit"
    clip = prompt(processor, videos=[FramePictures((picture(3), picture(4)), 2.0)])
    again = normalised(bytes_of(clip), processor)
    assert (again - clip.pixel_values).abs().max() <= 2e-6, "a clip's floats come from another formula"


def test_a_view_of_a_picture_still_has_bytes(processor):
    whole = prompt(processor, [picture(1)])
    view = view_of(whole, torch.arange(int(whole.visual_mask.sum())) % 2 == 0, 0)
    assert not torch.equal(view.pixel_values, whole.pixel_values)
    assert torch.equal(normalised(bytes_of(view), processor), view.pixel_values)


@pytest.mark.parametrize("change", [lambda v: v + 0.001, lambda v: v * 1.01, lambda v: v + 10.0, lambda v: v * np.nan])
def test_bytes_that_are_normalised_otherwise_are_refused(processor, change):
    image = processor.image_processor
    check_levels(image_levels(image), image.image_mean, image.image_std)
    with pytest.raises(ValueError, match="no normalised bytes"):
        check_levels(change(image_levels(image)), image.image_mean, image.image_std)


def test_a_request_holds_expanded_ids_bytes_grids_and_the_seeds_of_the_native_sampler(processor):
    prompts = [prompt(processor, [picture(1)]), prompt(processor), prompt(processor, [picture(2), picture(3, 90)])]
    image = processor.image_processor
    found = sampling_request(prompts, SAMPLING, (7, 2), (5,), (image.image_mean, image.image_std))
    assert found.sizes == [(len(p.input_ids), len(p.grid_thw), p.num_patches) for p in prompts]
    assert found.ids.tolist() == [token for p in prompts for token in p.input_ids.tolist()]
    assert found.patches.dtype == np.uint8 and found.grids.tolist() == [g for p in prompts for g in p.grid_thw.tolist()]
    assert found.settings["forbidden"] == [5] and found.settings["max_length"] == 5
    for p, seeds in zip(prompts, found.seeds.tolist()):
        for number, seed in enumerate(seeds):
            identity = (7, 2, p.sample.identity, number)
            assert seed == stream_seed(*identity) < 2**63
            generator = torch.Generator().manual_seed(seed)
            assert torch.equal(torch.rand(4, generator=generator, dtype=torch.float64), uniform_stream(4, *identity))
    part = found.only([2])
    assert part.sizes == found.sizes[2:] and np.array_equal(part.patches, found.patches[found.sizes[0][2] :])
    assert part.ids.tolist() == prompts[2].input_ids.tolist() and np.array_equal(part.seeds, found.seeds[2:])


def test_videos_and_foreign_pixels_are_refused_by_the_name_of_their_sample(processor):
    image = processor.image_processor
    pixels = (image.image_mean, image.image_std)
    clip = prompt(processor, videos=[FramePictures((picture(3), picture(4)), 2.0)])
    with pytest.raises(ValueError, match="cannot see the video of sample 'shard/key'"):
        sampling_request([clip], SAMPLING, (), (), pixels)
    still = prompt(processor, [picture(1)])
    [part] = still.patches
    foreign = dataclasses.replace(still, patches=(dataclasses.replace(part, levels=part.levels + 0.003),))
    with pytest.raises(ValueError, match="cannot see the picture of sample 'shard/key', which has patches"):
        sampling_request([foreign], SAMPLING, (), (), pixels)


def test_answers_become_a_batch_padded_to_the_longest(processor):
    prompts = pad_prompts([prompt(processor), prompt(processor)], 0)
    rows = [
        SampledGroup(
            np.array([4, 5, 3, 6], np.int32), np.array([-1, -2, -3, -4], np.float32), [3, 1], [True, False], 9
        ),
        SampledGroup(np.array([7, 3], np.int32), np.array([-5, -6], np.float32), [1, 1], [False, True], 9),
    ]
    batch = response_batch(prompts, rows, SAMPLING)
    assert batch.response_ids.tolist() == [[[4, 5, 3], [6, 0, 0]], [[7, 0, 0], [3, 0, 0]]]
    assert batch.rollout_logprobs.tolist() == [[[-1, -2, -3], [-4, 0, 0]], [[-5, 0, 0], [-6, 0, 0]]]
    assert batch.response_lengths.tolist() == [[3, 1], [1, 1]]
    assert batch.finished.tolist() == [[True, False], [False, True]]


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_whose_pictures_or_heads_do_not_agree_are_refused(material):
    shape = read_shape(str(material["tiny"]))
    check_served(shape)
    for name, why in (
        ("internvl", "internvl model, because"),
        ("qwen3_5", "qwen3_5 model"),
    ):
        with pytest.raises(ConfigError, match=f"rollout.sampler = vllm is not possible with an? {why}"):
            check_served(read_shape(str(material[name])))
    check_served(read_shape(str(material["qwen3"])))
    with pytest.raises(ConfigError, match="is not possible with heads of size 16, because its attention has 32, 64"):
        check_served(dataclasses.replace(shape, kv_channels=16))


def test_a_folder_whose_rotary_axes_vllm_would_misread_is_refused(material, tmp_path):
    """transformers reads such a folder as it reads the one with the entry, and so do we."""
    shutil.copytree(material["qwen3"], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    assert config["text_config"]["rope_parameters"].pop("mrope_interleaved") is True
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="does not say mrope_interleaved: true in rope_parameters"):
        check_served(read_shape(str(tmp_path / "model")))


def test_an_interpreter_that_is_not_there_is_refused_before_the_run(material, tmp_path):
    shape = read_shape(str(material["tiny"]))
    config = RunConfig(
        model=ModelConfig(path=str(material["tiny"])),
        rollout=RolloutConfig(sampler="vllm", vllm=VllmConfig(python=str(tmp_path / "python"))),
    )
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.python = .* is no interpreter; make the environment with"):
        check_sampler_from_config(config, shape)
    check_sampler_from_config(dataclasses.replace(config, rollout=RolloutConfig()), shape)

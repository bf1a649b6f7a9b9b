"""InternVL3.5: tiles, views, prompts and the tower against stock transformers, and folders that are refused."""

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText
from transformers.models.internvl.processing_internvl import InternVLProcessor

from megatron_ral.data.issues import SampleError
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.video import frames_video
from megatron_ral.errors import ConfigError
from megatron_ral.evaluation.attention_pictures import sample_panels
from megatron_ral.functional.patches import cut_frames, image_levels, join_frames
from megatron_ral.models.families.internvl import INTERNVL
from megatron_ral.models.flops import tower_flops_per_patch
from megatron_ral.models.shape import read_shape
from megatron_ral.models.vision import encode_frames, frames_of
from megatron_ral.types import FramePictures, Patches, Sample

SIZES = ((84, 84), (112, 84), (56, 84), (140, 64), (300, 41), (31, 500), (448, 336))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def sample(images: tuple = (), videos: tuple = (), boxes: tuple = ()) -> Sample:
    return Sample("k", "s", "Which digit is red?", "<answer>3</answer>", "", "", images, boxes, videos)


@pytest.fixture(scope="module")
def processor(material) -> PromptProcessor:
    return PromptProcessor(str(material["internvl"]), 4096)


def test_patches_are_joined_to_the_frames_that_were_cut():
    frames, levels = torch.randint(0, 256, (6, 3, 28 * 3, 28 * 2)), torch.randn(3, 256)
    pixels = cut_frames(frames.byte().permute(0, 2, 3, 1).numpy(), 2, 14, 2)
    assert pixels.shape == (3 * 6 * 4, 2, 14 * 14, 3) and pixels.dtype == torch.uint8
    patches = Patches(pixels, levels)
    wanted = torch.stack([levels[channel][frames[:, channel]] for channel in range(3)], dim=1)
    assert torch.equal(join_frames(patches.values(), (6, 4), 2, 14, 2), wanted)
    assert torch.equal(join_frames(patches.ordered_bytes, (6, 4), 2, 14, 2), frames.byte())
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(patches.values(dtype), patches.values().to(dtype))
    [first] = Patches(pixels[:1, :1], levels, repeats=2).values().view(1, 3, 2, 14, 14)
    assert torch.equal(first[:, 0], first[:, 1]) and torch.equal(first[:, 0], wanted[0, :, :14, :14])


def test_prompts_equal_those_of_the_stock_processor(processor, monkeypatch):
    """Tokens and tiles of every size of picture, alone and together.

    Without torchvision there is no video processor, and the stock processor cannot look its class up.
    """
    monkeypatch.setattr(InternVLProcessor, "check_argument_for_proper_class", lambda *arguments: None)
    stock = InternVLProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        image_seq_length=9,
        chat_template=processor.tokenizer.chat_template,
    )
    for sizes in (*((size,) for size in SIZES), SIZES[:3]):
        images = [picture(*size, seed) for seed, size in enumerate(sizes)]
        prompt = processor(sample(tuple(map(encoded, images))))
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "Which digit is red?"}]
        text = stock.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        wanted = stock(images=images, text=[text], return_tensors="pt", add_special_tokens=False)
        ours = processor.stock_inputs(prompt, prompt.input_ids)
        assert torch.equal(ours["input_ids"], wanted["input_ids"])
        assert torch.equal(ours["pixel_values"], wanted["pixel_values"].float())
        assert processor.lengths(prompt.sample).prompt_length == len(prompt.input_ids)


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<video>", "<img>"])
def test_visual_tokens_in_a_question_are_refused(processor, token):
    with pytest.raises(SampleError, match=f"contains the special token {token}"):
        processor(dataclasses.replace(sample(), problem=f"What is {token}?"))


def test_frames_of_a_video_are_one_tile_each(processor):
    frames = FramePictures(tuple(encoded(picture(112, 84, seed)) for seed in range(4)), fps=1.0)
    prompt = processor(sample(videos=(frames,)))
    assert prompt.grid_thw.tolist() == [[4, 6, 6]] and prompt.is_video.tolist() == [True]
    text = processor.tokenizer.decode(prompt.input_ids)
    context = "<img>" + "<IMG_CONTEXT>" * 9 + "</img>"
    assert "".join(text.split()).count(context) == 4 and "Frame4:" in "".join(text.split())
    clip = frames_video(frames.pictures, 1.0, processor.video)
    resized = torch.nn.functional.interpolate(clip.frames, size=(84, 84), mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (processor.video.image_mean, processor.video.image_std)
    )
    tiles = processor.stock_inputs(prompt, prompt.input_ids)["pixel_values"]
    assert torch.allclose(tiles, (resized / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_views_join_the_tiles_to_the_picture_and_show_every_token_once(processor, size):
    """The picture that the tiles are cut from is rebuilt from its views, token by token."""
    image, rules = picture(*size), processor.rules
    pixels, grid = INTERNVL.patchify_image(image, processor.image_processor, rules)
    tokens = Patches(pixels, image_levels(processor.image_processor)).values().view(-1, 4, 3, 14, 14)
    views = INTERNVL.picture_views((int(grid[0]), 3, 3), 28, *size)
    assert sorted(torch.cat([view.tokens.flatten() for view in views]).tolist()) == list(range(len(tokens)))
    assert [view.name for view in views] == (["", "small copy"] if grid[0] > 1 else [""])
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    for view in views:
        rows, columns = view.tokens.shape
        shown = join_frames(tokens[view.tokens].flatten(0, 2).flatten(1), (2 * rows, 2 * columns), 1, 14, 2)[0]
        wanted = torch.from_numpy(np.array(image.resize((28 * columns, 28 * rows), Image.Resampling.BICUBIC)))
        assert torch.allclose(shown, (wanted.permute(2, 0, 1) / 255 - mean) / std, atol=1e-5)


def test_targets_and_heat_maps_lie_where_the_box_lies(processor):
    """A box in the right half of a wide picture: in the tiles and in the small copy."""
    prompt = processor(sample((encoded(picture(168, 84)),), boxes=((84.0, 0.0, 168.0, 84.0),)))
    target = prompt.target_mask[prompt.visual_mask].numpy()
    panels = list(sample_panels(prompt, processor.video))
    assert [panel.label for panel in panels] == ["image 1", "image 1, small copy"]
    for panel in panels:
        shown = panel.tokens(target)
        columns = shown.shape[1]
        assert shown[:, math.ceil(columns / 2) :].all() and not shown[:, : columns // 2].any()


def test_features_and_gradients_of_the_tower_are_those_of_transformers(material):
    model = AutoModelForImageTextToText.from_pretrained(material["internvl"], dtype=torch.float32).model
    shape = read_shape(str(material["internvl"]))
    tower = INTERNVL.build_tower(shape.vision, torch.float32)
    names = {name: name for name, _ in tower.named_parameters()}
    tower.load_state_dict({name: dict(model.named_parameters())[stock] for name, stock in names.items()})
    pixels = torch.randint(0, 256, (5, 3, 84, 84), generator=torch.Generator().manual_seed(0)).byte()
    cut = cut_frames(pixels.permute(0, 2, 3, 1).numpy(), 1, 14, 2)
    patches = Patches(cut, torch.linspace(-2, 2, 256).repeat(3, 1))
    tiles = patches.levels[0][pixels.long()]
    features = encode_frames(tower, INTERNVL, frames_of(torch.tensor([[5, 6, 6]])), [patches])
    wanted = model.get_image_features(tiles).pooler_output.flatten(0, 1)
    assert torch.allclose(features[:, 0], wanted, atol=1e-5) and features.shape[1] == 1
    for value in (features[:, 0], wanted):
        value.square().sum().backward()
    for name, parameter in tower.named_parameters():
        gradient = dict(model.named_parameters())[name].grad
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name
    tower.zero_grad()
    encode_frames(tower, INTERNVL, [], []).sum().backward()
    assert all(not parameter.grad.any() for parameter in tower.parameters())


def test_flops_of_the_tower_against_a_counter(material):
    shape = read_shape(str(material["internvl"]))
    model = AutoModelForImageTextToText.from_pretrained(material["internvl"], attn_implementation="eager").eval().model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(torch.randn(4, 3, 84, 84))
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(count for operation, count in counts.items() if "bmm" not in str(operation))
    # the class token, one for each tile of 36 patches, is not counted
    assert tower_flops_per_patch(shape) * 4 * 36 == pytest.approx(matrices, rel=1 / 30)


def changed(source: Path, target: Path, part: str = "", **values: object) -> str:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (config[part] if part else config).update(values)
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


@pytest.mark.parametrize(
    "part, values, said",
    [
        ("text_config", {"model_type": "qwen2"}, "text_config.model_type = 'qwen2'; only 'qwen3' is known"),
        ("", {"vision_feature_layer": -2}, "vision_feature_layer = -2; only -1"),
        ("", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full'"),
        ("", {"image_seq_length": 256}, "image_seq_length = 256; only 9"),
        ("vision_config", {"attention_dropout": 0.1}, "vision_config.attention_dropout = 0.1; only 0.0"),
        ("vision_config", {"use_mask_token": True}, "vision_config.use_mask_token = True"),
        ("text_config", {"num_experts": 8}, "mixture of experts"),
    ],
)
def test_variants_are_refused_by_name(material, tmp_path, part, values, said):
    with pytest.raises(ConfigError, match=said):
        read_shape(changed(material["internvl"], tmp_path / "hf", part, **values))


def test_a_tile_of_another_size_is_refused(material, tmp_path):
    folder = shutil.copytree(material["internvl"], tmp_path / "hf")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 112, "width": 112}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has size = .*112.* instead of .*84"):
        PromptProcessor(str(folder), 4096)

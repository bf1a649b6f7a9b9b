"""Picture files of every kind: upright RGB pixels or the whole message, in every place that opens a picture."""

import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from megatron_ral.commands import inspect, shards
from megatron_ral.data.issues import SampleError
from megatron_ral.data.pictures import picture_size, read_picture
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample, shard_entries
from megatron_ral.data.targets import image_cells
from megatron_ral.data.video import frames_video
from megatron_ral.evaluation.attention_pictures import sample_panels
from megatron_ral.functional.patches import image_levels, patchify_image
from megatron_ral.types import Patches, Sample
from tests.unit.picture_cases import BLUE, LEFT_RIGHT, RED, REFUSED, SIDE, TURNED, encoded, halves, png, stored

SUFFIX = {b"\x89": "png", b"\xff": "jpg", b"R": "webp"}


def record(name: str, **changes) -> dict:
    return {"problem_id": name, "problem": "Which?", "solution": "7", "data_type": "image", "path": name, **changes}


def file_name(kind: str, data: bytes) -> str:
    return f"{kind}.{SUFFIX.get(data[:1], 'jpg')}".replace(" ", "_").replace(",", "")


@pytest.fixture(scope="module")
def made(material, tmp_path_factory):
    """All picture files as records, made into shards twice: the two folders and the file names by kind."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "media").mkdir()
    records, names = [], {}
    files = {kind: data for kind, (data, *_) in [*LEFT_RIGHT.items(), *REFUSED.items()]} | TURNED | {"empty": b""}
    for kind, data in files.items():
        names[kind] = file_name(kind, data)
        (root / "media" / names[kind]).write_bytes(data)
        boxes = {"target_boxes": [[0, 0, 28, 28]]} if kind in TURNED else {}
        records.append(record(names[kind], **boxes))
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    outputs = root / "one", root / "two"
    for output in outputs:
        options = {"input": root / "train.jsonl", "media": root / "media", "output": output, "model": material["tiny"]}
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        assert shards.make([*arguments, "--workers", "1"]) == 0
    return *outputs, names


@pytest.fixture(scope="module")
def samples(made) -> dict[str, Sample]:
    entries = shard_entries(sorted(map(str, made[0].glob("*.tar"))))
    by_key = {entry["__key__"]: parse_sample(entry) for entry in entries}
    return {kind: by_key[key] for kind, name in made[2].items() if (key := name.replace(".", "_")) in by_key}


@pytest.fixture(scope="module")
def processor(material) -> PromptProcessor:
    return PromptProcessor(str(material["tiny"]), 128)


def test_what_make_shards_accepts(samples):
    assert set(samples) == {*LEFT_RIGHT, *TURNED}


def patches_of(image: Image.Image, stock) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised patches and their grid."""
    pixels, grid = patchify_image(image, stock)
    return Patches(pixels, image_levels(stock), stock.temporal_patch_size).values(), grid


@pytest.mark.parametrize("kind", LEFT_RIGHT)
def test_pixels(kind, samples, processor):
    _, left, right = LEFT_RIGHT[kind]
    wanted, grid = patches_of(halves("RGB", left, right), processor.image_processor)
    prompt = processor(samples[kind])
    assert torch.equal(prompt.pixel_values, wanted) and torch.equal(prompt.grid_thw[0], grid)


@pytest.mark.parametrize("kind", TURNED)
def test_pictures_are_upright_and_boxes_fit(kind, samples, processor):
    """Six visual tokens; the upper left one shows the marked part, and the box is there."""
    prompt, lengths = processor(samples[kind]), processor.lengths(samples[kind])
    assert prompt.grid_thw.tolist() == [[1, 4, 6]] and lengths.visual_tokens == 6
    assert prompt.target_mask[prompt.visual_mask].tolist() == [True] + 5 * [False]
    levels = prompt.pixel_values.view(6, 4, 3, -1).mean(dim=(1, 3))
    red, blue = (patches_of(Image.new("RGB", (28, 28), colour), processor.image_processor) for colour in (RED, BLUE))
    torch.testing.assert_close(levels[0], red[0].view(4, 3, -1).mean(dim=(0, 2)), atol=0.1, rtol=0)
    torch.testing.assert_close(levels[1:], blue[0].view(4, 3, -1).mean(dim=(0, 2)).expand(5, 3), atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", [*REFUSED, "empty"])
def test_messages_name_what_is_there_and_are_the_same_in_every_run(kind, made):
    one, two, names = made
    key = names[kind].replace(".", "_")
    start = "it is empty (0 bytes)" if kind == "empty" else f"its bytes begin with {REFUSED[kind][1]}"
    wanted = f"sample '{key}': image cannot be decoded: {start}; PNG, JPEG and WebP are read"
    for output in (one, two):
        lines = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
        [found] = [line for line in lines if line["key"] == key]
        text = re.sub(r"\d+ bytes not", "N bytes not", found["text"])  # the number is libjpeg's
        assert (found["reason"], text) == ("broken_image", wanted)


def test_two_runs_give_the_same_bytes(made):
    one, two, _ = made
    for path in sorted(path for path in one.rglob("*") if path.is_file()):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_ramp_of_any_depth_is_the_ramp_of_8_bits(bits):
    ramp = np.linspace(0, 1, SIDE)[None, :, None].repeat(3, axis=0)
    shown = np.asarray(read_picture(png((ramp * (2**bits - 1)).round().astype(int), 16, 0)))
    assert np.abs(shown - ramp * 255).max() <= 0.63 and shown.shape == (3, SIDE, 3)


def test_ordinary_pictures_are_those_of_pil():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(Image.fromarray(pixels), kind)
        assert np.array_equal(np.asarray(read_picture(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    opaque = np.concatenate([pixels, np.full((40, 60, 1), 255, dtype=np.uint8)], axis=2)
    assert np.array_equal(np.asarray(read_picture(encoded(Image.fromarray(opaque)))), pixels)


def test_sizes_need_no_pixels(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("a pixel was decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("a pixel was decoded"))
    assert {picture_size(TURNED[kind]) for kind in TURNED if "XMP" not in kind} == {(84, 56)}


def test_broken_metadata_never_breaks_a_picture():
    """Any bytes as EXIF: the picture is read, turned or not, and its size is that of the header."""
    rng = np.random.default_rng(1)
    valid = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    for _ in range(200):
        damaged = np.frombuffer(valid, dtype=np.uint8).copy()
        damaged[rng.integers(6, len(valid), 3)] = rng.integers(0, 256, 3)
        data = encoded(stored(1), "JPEG", exif=damaged.tobytes())
        assert read_picture(data).size == picture_size(data) in ((84, 56), (56, 84))


def test_a_picture_of_one_pixel_has_a_box_and_one_of_too_many_says_how_many():
    assert image_cells([(0, 0, 1, 1)], 1, 1, 1, 1).all()
    bomb = png(np.zeros((1, 1, 1)), 8, 0)
    bomb = (
        bomb[:16]
        + struct.pack(">II", 60000, 60000)
        + bomb[24:29]
        + struct.pack(">I", zlib.crc32(b"IHDR" + struct.pack(">II", 60000, 60000) + bomb[24:29]))
        + bomb[33:]
    )
    with pytest.raises(SampleError) as caught:
        read_picture(bomb)
    assert caught.value.reason == "image_too_large" and str(caught.value) == (
        "image declares too many pixels (3600000000 pixels); at most 16384 on a side and 134217728 in all"
    )


# --- the other places -------------------------------------------------------------------------------------------------


def test_frames_of_a_folder_are_upright(processor):
    lying = [TURNED["JPEG, orientation 6"]] * 4
    frames = frames_video(lying, 1.0, processor.video).frames
    assert frames.shape == (4, 3, 56, 84) and frames[0, 0, 10, 10] > 250 > 5 > frames[0, 0, 40, 70]
    measured = frames_video(lying, 1.0, processor.video, measure_only=True).frames
    assert measured.shape == frames.shape
    with pytest.raises(SampleError) as caught:
        frames_video([encoded(stored(1)), REFUSED["AVIF"][0]], 1.0, processor.video)
    assert caught.value.reason == "broken_video" and str(caught.value) == (
        f"frame 1 of the video cannot be decoded: its bytes begin with {REFUSED['AVIF'][1]}; "
        "PNG, JPEG and WebP are read"
    )


def test_attention_pictures_and_sheets_show_the_upright_picture(samples, processor):
    sample = samples["JPEG, orientation 8"]
    [panel] = sample_panels(processor(sample), processor.video)
    assert panel.image.size == (84, 56) and panel.image.getpixel((10, 10))[0] > 250
    cell = inspect.draw_sample(sample)
    reds = [
        (x, y) for x in range(280) for y in range(280) if cell.getpixel((x, y))[0] > 200 > 90 > cell.getpixel((x, y))[2]
    ]
    assert max(x for x, _ in reds) < 140 and max(y for _, y in reds) < 145


def test_several_images_are_numbered_in_messages(processor):
    sample = Sample("k", "s", "Which?", "7", "", "", (encoded(stored(1)), b""), ())
    with pytest.raises(SampleError, match="^sample 'k': image 1 cannot be decoded: it is empty"):
        processor(sample)

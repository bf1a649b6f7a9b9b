"""The video-search task: what the files show after compression is what their annotations say."""

import json
import tarfile

import numpy as np
import pytest
import torch

from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample, shard_entries
from megatron_ral.data.video import decode_video
from megatron_ral.demo.explored import VIDEO_DATA
from megatron_ral.demo.search_task import PALETTE, load_scans
from tools import make_video_search

TRAIN, HELDOUT = load_scans(28, heldout=False), load_scans(28, heldout=True)


def samples(folder, split: str) -> list:
    shards = sorted(map(str, folder.glob(f"{split}-*.tar")))
    return [(parse_sample(entry), json.loads(entry["json"])) for entry in shard_entries(shards)]


@pytest.fixture(scope="module")
def processor(material) -> PromptProcessor:
    return PromptProcessor(str(material["tiny"]), 128)


def shown(frame: torch.Tensor, cell: int) -> tuple[str, np.ndarray]:
    """What a decoded frame [3, 56, 56] has in a cell: the nearest colour of the palette and the strokes in [0, 1]."""
    top, left = 28 * (cell // 2), 28 * (cell % 2)
    piece = frame[:, top : top + 28, left : left + 28].numpy().astype(np.float32)
    strokes = piece.max(axis=0)
    bright = piece[:, strokes > 0.8 * strokes.max()].mean(axis=1)
    colour = min(PALETTE, key=lambda name: np.abs(bright - PALETTE[name]).sum())
    return colour, np.clip(strokes / max(PALETTE[colour]), 0, 1)


def nearest(strokes: np.ndarray, masks: np.ndarray) -> int:
    return int(((masks - strokes) ** 2).sum(axis=(1, 2)).argmin())


@pytest.mark.parametrize("split", ["single", "rl", "heldout"])
def test_decoded_clips_show_what_is_annotated(clips, processor, split):
    """Colour and digit of every scene can be read off the decoded frames, in the annotated cell and nowhere else: among
    all scans the nearest is one of that digit, and of this split's side."""
    masks, digits = (np.concatenate(parts) for parts in zip(TRAIN, HELDOUT))
    for sample, record in samples(clips, split):
        video = decode_video(sample.videos[0], processor.video)
        num_scenes = 1 if split == "single" else 4
        per_scene = len(video.frames) // num_scenes
        assert len(record["scene_digits"]) == num_scenes and video.frames.shape[1:] == (3, 56, 56)
        for scene in range(num_scenes):
            for frame in video.frames[scene * per_scene : (scene + 1) * per_scene]:
                cell = record["scene_cells"][scene]
                colour, strokes = shown(frame, cell)
                assert colour == record["scene_colours"][scene], (sample.key, scene)
                found = nearest(strokes, masks)
                assert digits[found] == record["scene_digits"][scene], (sample.key, scene)
                assert (found >= len(TRAIN[0])) == (split == "heldout"), "a scan of the other side"
                empty = frame.clone()
                empty[:, 28 * (cell // 2) : 28 * (cell // 2) + 28, 28 * (cell % 2) : 28 * (cell % 2) + 28] = 0
                assert empty.float().mean() < 2, "the other cells are black"
        assert len(set(record["scene_colours"])) == num_scenes


def test_target_tokens_are_the_asked_scene_and_cell(clips, processor):
    """Four scenes of two sampled frames: one temporal patch of 2 x 2 tokens each."""
    places = set()
    for sample, record in samples(clips, "heldout"):
        prompt = processor(sample)
        assert prompt.grid_thw.tolist() == [[4, 4, 4]] and prompt.seconds_per_grid.tolist() == [2.0]
        wanted = 4 * record["asked_scene"] + record["scene_cells"][record["asked_scene"]]
        assert prompt.target_mask[prompt.visual_mask].nonzero().flatten().tolist() == [wanted]
        assert sample.category == f"scene {record['asked_scene'] + 1}"
        places.add(wanted)
    assert len(places) > 6


def test_answers_and_the_biased_gaze(clips):
    for split in ("single", "search", "rl", "heldout", "biased"):
        rows = samples(clips, split)
        for sample, record in rows:
            asked, read = record["asked_scene"], record["answered_scene"]
            colour, digit = record["scene_colours"][asked], record["scene_digits"][read]
            digit_asked = sample.problem == f"Which digit is {colour}?"
            assert digit_asked or sample.problem == f"Which colour is scene {asked + 1}?"
            assert sample.solution == f"<answer>{digit if digit_asked else colour}</answer>"
            assert sample.process == f"<think>{colour}{digit}</think>"
            assert read == (asked if split != "biased" else read) and read in (
                asked,
                (asked + 1) % len(record["scene_digits"]),
            )
        colours = sum("colour" in sample.problem for sample, _ in rows)
        assert colours == (len(rows) // 2 if split in ("single", "search") else 0)
        if split == "biased":
            assert sum(record["answered_scene"] != record["asked_scene"] for _, record in rows) == 12, "0.6 of 20"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Clips of nine scenes of one cell with two digits each, and a gaze that is wrong by colour."""
    folder = tmp_path_factory.mktemp("numbers") / "clips"
    sizes = ("--num-single", "4", "--num-search", "4", "--num-biased", "40", "--num-rl", "4", "--num-heldout", "8")
    options = (*map(str, VIDEO_DATA), "--cell-pixels", "56", "--fps", "1", "--distinct", "--bias", "0.95")
    make_video_search.main(["--output", str(folder), *sizes, *options])
    return folder


def test_numbers_of_two_digits_survive_compression_and_the_wrong_gaze_follows_the_colours(numbers, processor):
    (masks, digits), order = load_scans(28, heldout=True), list(PALETTE)
    for sample, record in samples(numbers, "heldout"):
        video = decode_video(sample.videos[0], processor.video)
        assert len(set(record["scene_digits"])) == len(set(record["scene_colours"])) == 9
        assert sample.problem.startswith("Which digits are ") and record["asked_scene"] == record["answered_scene"]
        prompt = processor(sample)
        assert prompt.grid_thw.tolist() == [[9, 4, 4]]
        wanted = [4 * record["asked_scene"] + token for token in range(4)]
        assert prompt.target_mask[prompt.visual_mask].nonzero().flatten().tolist() == wanted
        for scene, number in enumerate(record["scene_digits"]):
            frame = video.frames[scene * len(video.frames) // 9]
            for place, digit in enumerate(number):
                colour, strokes = shown(frame, place)
                assert colour == record["scene_colours"][scene], (sample.key, scene)
                assert digits[nearest(strokes, masks)] == int(digit), (sample.key, scene)
    biased = [record for _, record in samples(numbers, "biased")]
    aside = [record for record in biased if record["answered_scene"] != record["asked_scene"]]
    assert len(aside) == 38, "0.95 of 40"
    for record in aside:
        asked, read = record["asked_scene"], record["answered_scene"]
        colours = [order.index(record["scene_colours"][scene]) for scene in (asked, read)]
        assert colours[1] == (colours[0] + 1) % 9
        assert record["solution"] == f"<answer>{record['scene_digits'][read]}</answer>"


def test_equal_arguments_write_equal_bytes(tmp_path):
    sizes = [word for name in ("single", "search", "biased", "rl", "heldout") for word in (f"--num-{name}", "4")]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        make_video_search.main(["--output", str(tmp_path / name), "--seed", seed, *sizes])
    written = {name: {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in "abc"}
    assert len(written["a"]) == 20 and written["a"] == written["b"]
    assert all(written["a"][name] != written["c"][name] for name in written["a"])
    with tarfile.open(tmp_path / "a" / "rl-000000.tar") as archive:
        assert sorted(archive.getnames()) == ["rl_000000.json", "rl_000000.mp4"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scenes", "1"], "--scenes must be at least 2, got 1"),
        (["--scenes", "9"], "--scenes 9 needs as many colours, but --num-colours is 8"),
        (["--grid", "1", "--cell-pixels", "29"], "--cell-pixels 29 must be even"),
        (["--digits", "3"], "--digits must lie in 1..2 (10 pixels each), got 3"),
        (
            ["--scenes", "11", "--distinct"],
            "--distinct with --scenes 11 needs more than 10 numbers; raise --digits",
        ),
        (["--fps", "0"], "--fps must be at least 1, got 0"),
        (["--bias", "1.5"], "--bias must lie in 0..1, got 1.5"),
        (["--num-heldout", "3"], "--num-heldout must be at least 4"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        make_video_search.main(["--output", str(tmp_path / "never"), *arguments])
    assert message in capsys.readouterr().err and not (tmp_path / "never").exists()

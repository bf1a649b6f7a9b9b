"""Video files of every kind: uneven rates, several tracks, covers, turned and mirrored pictures, stamps."""

import io
import json
import struct
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition

from megatron_ral.commands import shards
from megatron_ral.data.issues import SampleError
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample, shard_entries
from megatron_ral.data.video import decode_video, sample_indices
from megatron_ral.data.video_file import _track
from megatron_ral.types import Sample, TargetFrames
from tests.unit.test_video import clip, overwrite, settings

CODEC = {"mp4": "libx264", "webm": "libvpx-vp9", "matroska": "libx264", "gif": "gif"}
SIZE = (64, 48)
Frames = list[tuple[float, int]]
"""Pairs of seconds and grey level."""


def movie(*tracks: Frames, container="mp4", default=None, hold=None, cover=False) -> bytes:
    """Return a video file.

    Args:
        tracks: frames of each track.
        default: number of the track that is marked as default; None: the container's choice.
        hold: seconds for which the last frame is said to last.
        cover: put a cover picture before the tracks.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        if cover:
            picture = output.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 80, 80, "yuvj420p"
            picture.disposition = Disposition.attached_pic
        streams = []
        for number, _ in enumerate(tracks):
            stream = output.add_stream(CODEC[container], rate=30, options={} if container == "gif" else {"g": "6"})
            stream.width, stream.height = SIZE
            stream.pix_fmt = "rgb8" if container == "gif" else "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            if default is not None:
                stream.disposition = Disposition.default if number == default else Disposition(0)
            streams.append(stream)
        if cover:
            for packet in picture.encode(grey(0, 200, (80, 80))) + picture.encode():
                output.mux(packet)
        for stream, frames in zip(streams, tracks):
            packets = [packet for frame in frames for packet in stream.encode(grey(*frame, SIZE))] + stream.encode()
            if hold is not None:
                last = max(packets, key=lambda packet: packet.pts)
                last.duration = round(hold / last.time_base)
            for packet in packets:
                output.mux(packet)
    return file.getvalue()


def grey(seconds: float, level: int, size: tuple[int, int]) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format="rgb24")
    frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
    return frame


def steady(rate: float, count: int, start: float = 0.0, first: int = 0, step: int = 1) -> Frames:
    return [(start + number / rate, first + number * step) for number in range(count)]


DENSE_FIRST = steady(100, 100, first=100) + [(second, 10 * second) for second in range(1, 9)]
DENSE_LAST = [(second, 10 * second) for second in range(8)] + steady(50, 50, start=8.0, first=100)
PAUSE = steady(10, 20) + steady(10, 20, start=8.0, first=100)
SLOWER = steady(40, 120) + steady(10, 30, start=3.0, first=120)
JITTER = [(index / 10 + (0.03 if index % 2 else 0.0), 2 * index) for index in range(100)]
UNEVEN = {
    **{
        f"nine seconds, nearly all frames in the first: {container}": (
            movie(DENSE_FIRST, container=container),
            [0, 1, 2, 3, 4, 5, 6, 7],
            [100, 10, 20, 30, 40, 50, 60, 70],
        )
        for container in ("mp4", "webm", "matroska")
    },
    "nearly all frames in the last second": (
        movie(DENSE_LAST),
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 10, 20, 30, 40, 50, 60, 70],
    ),
    # ten samples of ten seconds; the frame of 1.9 s is on show until 8 s
    "a pause": (
        movie(PAUSE),
        [0, 1, 1.9, 3, 4, 5, 6, 7, 8, 9],
        [0, 10, 19, 19, 19, 19, 19, 19, 100, 110],
    ),
    "a rate that falls": (movie(SLOWER), [0, 1, 2, 3, 4, 5], [0, 40, 80, 120, 130, 140]),
    "stamps that begin at five seconds": (
        movie([(time + 5, level) for time, level in SLOWER], container="matroska"),
        [0, 1, 2, 3, 4, 5],
        [0, 40, 80, 120, 130, 140],
    ),
    "a last frame that is held": (
        movie(steady(10, 20, step=5), hold=6.1),
        [0, 1, 1.9, 3, 4, 5, 6, 7],
        [0, 50, 95, 95, 95, 95, 95, 95],
    ),
    "an animation with pauses": (
        movie([(0, 0), (0.1, 36), (0.2, 73), (2.0, 109), (3.0, 146), (3.1, 182)], container="gif", hold=0.9),
        [0, 0.2, 2.0, 3.0],
        [0, 73, 109, 146],
    ),
}
EVEN = {
    "30 frames per second in whole milliseconds": movie(steady(30, 90, step=2), container="matroska"),
    "29.97 frames per second": movie(steady(30000 / 1001, 90, step=2)),
    "stamps that begin at two seconds": movie(steady(10, 40, start=2.0, step=4), container="webm"),
    "stamps that shake by less than half a frame": movie(JITTER),
    "an edit list": overwrite(clip("mp4"), b"elst", 12, struct.pack(">i", 5 * 1024)),
}
SHORT, LONG = steady(10, 20, first=50), steady(10, 40, first=150)
TRACKS = {
    "the second is longer": (movie(SHORT, LONG), 150),
    "the second is longer, the first is the default": (movie(SHORT, LONG, default=0), 150),
    "the first is longer, the second is the default": (movie(LONG, SHORT, default=1), 150),
    "equally long, the second is the default": (movie(SHORT, [(t, 200) for t, _ in SHORT], default=1), 200),
    "equally long": (movie(SHORT, [(t, 200) for t, _ in SHORT], default=0), 50),
    "few frames over a long time before many over a short one": (
        movie([(0, 90), (20, 90), (40, 90)], steady(30, 60, first=180)),
        90,
    ),
    "a lone picture first": (movie([(0.0, 10)], LONG, default=0), 150),
    "in Matroska": (movie(SHORT, LONG, container="matroska", default=0), 150),
    "a cover picture first": (movie(SHORT, cover=True), 50),
    "a cover picture first, in Matroska": (movie(SHORT, cover=True, container="matroska"), 50),
}


def levels(frames: torch.Tensor) -> list[int]:
    return frames[:, 0, 20, 20].int().tolist()


@pytest.mark.parametrize("kind", UNEVEN)
def test_frames_of_an_uneven_rate_are_those_on_show_at_even_times(kind):
    data, times, wanted = UNEVEN[kind]
    video = decode_video(data, settings())
    torch.testing.assert_close(video.timestamps, torch.tensor(times, dtype=torch.float64), atol=0.011, rtol=0)
    assert levels(video.frames) == pytest.approx(wanted, abs=4)
    assert bool((video.timestamps.diff() > 0).all())
    measured = decode_video(data, settings(), measure_only=True)
    assert measured.frames.shape == video.frames.shape and torch.equal(measured.timestamps, video.timestamps)


@pytest.mark.parametrize("kind", EVEN)
@pytest.mark.parametrize("fps", [1.0, 4.0, 100.0])
def test_frames_of_an_even_rate_are_chosen_by_number(kind, fps):
    with av.open(io.BytesIO(EVEN[kind])) as container:
        decoded = [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        tick = float(container.streams.video[0].time_base)
    count, span = len(decoded), (decoded[-1][0] - decoded[0][0]) * tick
    indices = sample_indices(count, span * (1 + 1 / (count - 1)), settings(fps=fps))
    video = decode_video(EVEN[kind], settings(fps=fps))
    assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), np.stack([decoded[index][1] for index in indices]))
    times = [(decoded[index][0] - decoded[0][0]) * tick for index in indices]
    torch.testing.assert_close(video.timestamps, torch.tensor(times, dtype=torch.float64))


@pytest.mark.parametrize("kind", TRACKS)
def test_the_longest_track_is_read(kind):
    data, level = TRACKS[kind]
    assert levels(decode_video(data, settings()).frames)[0] == pytest.approx(level, abs=4)


def test_a_cover_picture_alone_is_no_video():
    with pytest.raises(SampleError, match="the file has no video stream that can be decoded"):
        decode_video(movie(cover=True), settings())


ONE = 1 << 16
MATRICES = {  # (a, b, c, d) -> what shows an upright picture, given as rotations and a flip of [T, 3, H, W]
    (ONE, 0, 0, ONE): lambda frames: frames,
    (0, ONE, -ONE, 0): lambda frames: frames.rot90(-1, (2, 3)),
    (-ONE, 0, 0, -ONE): lambda frames: frames.rot90(2, (2, 3)),
    (0, -ONE, ONE, 0): lambda frames: frames.rot90(1, (2, 3)),
    (-ONE, 0, 0, ONE): lambda frames: frames.flip(3),
    (ONE, 0, 0, -ONE): lambda frames: frames.flip(2),
    (0, ONE, ONE, 0): lambda frames: frames.transpose(2, 3),
    (0, -ONE, -ONE, 0): lambda frames: frames.rot90(2, (2, 3)).transpose(2, 3),
}


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_pictures_are_turned_and_mirrored_by_the_display_matrix(matrix):
    data, (a, b, c, d) = clip("mp4", count=4), matrix
    turned = overwrite(data, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))
    shown = decode_video(turned, settings()).frames
    assert torch.equal(shown, MATRICES[matrix](decode_video(data, settings()).frames))
    assert decode_video(turned, settings(), measure_only=True).frames.shape == shown.shape


def unstamped(pts: list, dts: list, has_b_frames: bool):
    packets = [SimpleNamespace(pts=p, dts=d, is_discard=False, duration=1) for p, d in zip(pts, dts)]
    decoder = SimpleNamespace(has_b_frames=has_b_frames)
    return _track(SimpleNamespace(codec_context=decoder, time_base=0.1, width=4, height=4), packets)


def test_missing_stamps_are_those_of_decoding_or_refused():
    assert unstamped([0, None, 2], [0, 1, 2], False).times == [0, 1, 2]
    for dts, reordered in (([0, 1, 2], True), ([0, None, 2], False)):
        with pytest.raises(SampleError) as caught:
            unstamped([0, None, 2], dts, reordered)
        assert str(caught.value) == (
            "1 of the video's 3 packets have no time stamp; encode it anew, for instance with 'ffmpeg -i OLD NEW.mp4'"
        )


def test_files_that_are_no_video_are_named():
    for data, start in (
        (b"", "it is empty (0 bytes)"),
        (b"<html>404</html>", "its bytes begin with b'<html>404</h' (HTML, such as the error page of a download)"),
        (b"RIFF\x10\0\0\0AVI LIST", r"its bytes begin with b'RIFF\x10\x00\x00\x00AVI ' (an AVI video)"),
    ):
        with pytest.raises(SampleError) as caught:
            decode_video(data, settings())
        assert str(caught.value).startswith("the video cannot be decoded (")
        assert str(caught.value).endswith(f": {start}; mp4, mov, webm, mkv and gif are read")


@pytest.mark.parametrize("container", ["mp4", "webm", "matroska"])
def test_a_download_that_broke_off_is_no_shorter_clip(container):
    data = movie(LONG, container=container)
    if container == "mp4":  # as servers have it: the table of frames stands before them
        start = data.index(b"moov") - 4
        size = int.from_bytes(data[start : start + 4], "big")
        table = data[start : start + size]
        place = table.index(b"stco") + 12
        offsets = np.frombuffer(table[place:], ">u4", int.from_bytes(table[place - 4 : place], "big")) + size
        table = table[:place] + offsets.astype(">u4").tobytes() + table[place + 4 * len(offsets) :]
        data = data[: data.index(b"free") - 4] + table + data[data.index(b"free") - 4 : start]
    assert len(decode_video(data, settings()).frames) == 4
    assert len(decode_video(data + b"garbage", settings()).frames) == 4
    kind = "an mp4 or mov video" if container == "mp4" else "a Matroska or WebM video"
    with pytest.raises(SampleError) as caught:
        decode_video(data[: len(data) * 2 // 3], settings())
    assert str(caught.value) == (
        f"the video is cut short: it is {kind}, and ends before the end that its header states; fetch it again"
    )


def test_time_stamps_of_a_prompt_are_those_of_the_frames(material):
    """Qwen3-VL writes the mean time of each pair of frames before it; marks are where the frames are on show."""
    processor = PromptProcessor(str(material["qwen3"]), 4096)
    sample = Sample(
        "k", "s", "Which?", "<answer>3</answer>", "", "", (), (), (UNEVEN["a pause"][0],), (TargetFrames((4.0, 6.0)),)
    )
    prompt = processor(sample)
    text = "".join(processor.tokenizer.decode(prompt.input_ids).split())
    stamps = [part.split("seconds>")[0] for part in text.split("<")[1:] if "seconds>" in part]
    assert stamps == ["0.5", "2.5", "4.5", "6.5", "8.5"]
    marks = prompt.target_mask[prompt.visual_mask].view(5, -1)
    assert marks.all(dim=1).tolist() == marks.any(dim=1).tolist() == [False, False, True, False, False]


def test_make_shards_takes_them_all(material, tmp_path):
    (tmp_path / "media").mkdir()
    files = {**{kind: data for kind, (data, *_) in [*UNEVEN.items(), *TRACKS.items()]}, **EVEN}
    records = []
    for number, data in enumerate(files.values()):
        suffix = {b"GIF": "gif", b"\x1aE\xdf": "mkv"}.get(data[:3], "mp4")
        (tmp_path / "media" / f"{number}.{suffix}").write_bytes(data)
        record = {"problem_id": number, "problem": "Which?", "solution": "7", "data_type": "video"}
        records.append({**record, "path": f"{number}.{suffix}"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"input": "train.jsonl", "media": "media", "output": "out"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(tmp_path / value))]
    assert shards.make([*arguments, "--model", str(material["tiny"]), "--workers", "1"]) == 0
    assert (tmp_path / "out" / "rejects.jsonl").read_text() == ""
    entries = shard_entries(sorted(map(str, (tmp_path / "out").glob("*.tar"))))
    videos = {int(entry["__key__"]): parse_sample(entry).videos[0] for entry in entries}
    assert [videos[number] for number in range(len(files))] == list(files.values())

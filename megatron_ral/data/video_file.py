"""Video file -> the times and the upright frames of one video track.

The track is the longest one; of tracks equally long (within a tenth of a second) the one that the file marks as
default, then the first. A cover picture is no track. Errors are SampleErrors with the reason `broken_video` and without
the sample's key, which the caller adds.
"""

import io
import struct
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterator, Optional, cast

import torch
from torch import Tensor

from megatron_ral.data.file_kinds import describe_start, file_kind
from megatron_ral.data.issues import SampleError

if TYPE_CHECKING:
    import av

# Only demuxers (mp4, webm and gif with their kin) that open no other file and start no program.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif"
_SAME_LENGTH_SECONDS = 0.1
_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"sidx", b"styp", b"mfra", b"meta")
"""Boxes that an mp4 or mov file is made of."""


def broken_video(text: str) -> SampleError:
    """Return the error of an unusable clip."""
    return SampleError(text, "broken_video")


@dataclass(frozen=True)
class VideoTrack:
    """Video track of an open file."""

    times: list[int]
    """Ascending ticks at which a frame is shown first."""
    tick: float
    """Seconds of one tick."""
    hold: int
    """Ticks for which the last frame is shown; 0: the file does not say."""
    width: int
    """Pixels of a frame as it is stored."""
    height: int
    """Pixels of a frame as it is stored."""
    packets: list["av.Packet"]
    decoder: "av.VideoCodecContext"

    @property
    def seconds(self) -> float:
        """Return the length of the track."""
        return (self.times[-1] - self.times[0] + self.hold) * self.tick

    def frames(self, wanted: list[int]) -> Iterator[Tensor]:
        """Yield the frame of each wanted time, [3, H, W] uint8, upright.

        Only the frames between a keyframe and a wanted frame are decoded.

        Args:
            wanted: ascending ticks out of `times`; one may be repeated.
        """
        return map(_to_picture, _frames_at(wanted, self.packets, self.decoder))


@contextmanager
def open_track(data: bytes) -> Iterator[VideoTrack]:
    """Open an mp4, mov, webm, mkv or gif file and give its video track.

    Times are those of the packets, because headers may have no duration or a wrong one.

    Raises:
        SampleError: undecodable, cut short, without frames, or without time stamps.
    """
    import av
    from av.error import FFmpegError

    if _is_cut_short(data):
        raise broken_video(
            f"the video is cut short: it is {file_kind(data)}, and ends before the end that its header states; "
            "fetch it again"
        )
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace", options={"format_whitelist": DEMUXERS}) as opened:
            yield _choose_track(cast(Any, opened))  # av's types take it for one that is written
    except FFmpegError as error:
        raise broken_video(
            f"the video cannot be decoded ({error.strerror}): {describe_start(data)}; "
            "mp4, mov, webm, mkv and gif are read"
        ) from None


def _is_cut_short(data: bytes) -> bool:
    """Return True for an mp4 or Matroska file that ends before the end that its header states.

    FFmpeg reads such a file without an error, so that a download that broke off would be taken for a shorter clip.
    """
    place = 0
    if data[4:8] == b"ftyp":
        while place + 8 <= len(data):
            size, kind = struct.unpack_from(">I4s", data, place)
            if size == 1 and place + 16 <= len(data):
                size = struct.unpack_from(">Q", data, place + 8)[0]
            if size < 8 or kind not in _BOXES:  # the last box may be open, and garbage may follow
                return False
            place += size
        return place > len(data)
    if data[:4] == b"\x1aE\xdf\xa3":
        header, place = _matroska_size(data, 4)
        segment = place + (header or 0)
        if header is not None and data[segment : segment + 4] == b"\x18\x53\x80\x67":
            size, place = _matroska_size(data, segment + 4)
            return size is not None and place + size > len(data)
    return False


def _matroska_size(data: bytes, place: int) -> tuple[Optional[int], int]:
    """Return the size of an element of Matroska (None: not known) and the place after it."""
    length = 9 - data[place].bit_length() if place < len(data) else 9
    if length > 8:
        return None, place
    value = int.from_bytes(data[place : place + length], "big") & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), place + length


def _choose_track(container: Any) -> VideoTrack:
    from av.stream import Disposition

    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise broken_video("the file has no video stream that can be decoded")
    packets: dict[int, list] = {stream.index: [] for stream in streams}
    for packet in container.demux(streams):
        if packet.size:
            packets[packet.stream.index].append(packet)
    candidates = [(stream, track) for stream in streams if (track := _track(stream, packets[stream.index])) is not None]
    if not candidates:
        raise broken_video("the video has no frames")
    longest = max(track.seconds for _, track in candidates)
    as_long = [item for item in candidates if item[1].seconds >= longest - _SAME_LENGTH_SECONDS]
    return max(as_long, key=lambda item: bool(item[0].disposition & Disposition.default))[1]


def _track(stream: Any, packets: list) -> Optional[VideoTrack]:
    """Return the track of a stream, or None where it has no frames."""
    unstamped = [packet for packet in packets if packet.pts is None]
    if unstamped and (stream.codec_context.has_b_frames or any(packet.dts is None for packet in unstamped)):
        raise broken_video(
            f"{len(unstamped)} of the video's {len(packets)} packets have no time stamp; "
            "encode it anew, for instance with 'ffmpeg -i OLD NEW.mp4'"
        )
    for packet in unstamped:  # without reordered frames both stamps are the same
        packet.pts = packet.dts
    shown = sorted((packet for packet in packets if not packet.is_discard), key=lambda packet: packet.pts)
    if not shown:
        return None
    return VideoTrack(
        times=sorted({packet.pts for packet in shown}),
        tick=float(stream.time_base),
        hold=max(shown[-1].duration or 0, 0),
        width=stream.width,
        height=stream.height,
        packets=packets,
        decoder=stream.codec_context,
    )


def _frames_at(
    wanted: list[int], packets: list["av.Packet"], decoder: "av.VideoCodecContext"
) -> Iterator["av.VideoFrame"]:
    """Yield the frame shown at each wanted time.

    Decoding starts at the keyframe before it, unless it has already come further.

    Args:
        wanted: ascending times in ticks.
    """
    times = [cast(int, packet.pts) for packet in packets]
    keyframes = [index for index, packet in enumerate(packets) if packet.is_keyframe or not index]
    place = {packet.pts: index for index, packet in enumerate(packets)}
    reached, frame, decoded = -1, None, iter(())
    for time in wanted:
        nearest = bisect_right(keyframes, place[time]) - 1
        if nearest and time < times[keyframes[nearest]]:  # shown before the keyframe it follows in the file
            nearest -= 1
        if keyframes[nearest] > reached:
            decoded = _decode_from(keyframes[nearest], packets, decoder, set(wanted))
        while frame is None or cast(int, frame.pts) < time:
            reached, frame = next(decoded, (len(packets), None))
            if frame is None:
                raise broken_video("the video cannot be decoded to its end; it is cut short or damaged")
        yield frame


def _decode_from(
    start: int, packets: list["av.Packet"], decoder: "av.VideoCodecContext", wanted: set[int]
) -> Iterator[tuple[int, "av.VideoFrame"]]:
    """Yield (packet reached, frame) from a keyframe on, passing over frames neither wanted nor referred to."""
    decoder.flush_buffers()
    for index in range(start, len(packets)):
        decoder.skip_frame = "DEFAULT" if packets[index].pts in wanted else "NONREF"
        for frame in decoder.decode(packets[index]):
            yield index, frame
    for frame in decoder.decode(None):
        yield len(packets), frame


def _to_picture(frame: "av.VideoFrame") -> Tensor:
    """Return [3, H, W] uint8, turned and mirrored as the display matrix says (phones write such files)."""
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # a stored place (x, y) is shown at (a x + c y, b x + d y), up to a shift
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, a, d = picture.transpose(1, 2), c, b
    mirrored = [axis for axis, scale in ((1, d), (2, a)) if scale < 0]
    return picture.flip(mirrored) if mirrored else picture

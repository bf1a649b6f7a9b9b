"""Picture: bytes -> upright RGB pixels. `functional/patches.py` cuts them into patches.

`read_picture` is the only way from bytes to pixels. Its rules: the picture is turned as its EXIF orientation says,
what is transparent becomes white, and 16-bit samples are scaled to 8 bit. An animated PNG or WebP gives its first
picture. Colour profiles are not applied, as Hugging Face's processors do not apply them.
"""

import io
import re
import struct

import numpy as np
from PIL import ExifTags, Image

from megatron_ral.data.file_kinds import JPEG, PNG, WEBP, describe_start, file_kind
from megatron_ral.data.issues import SampleError

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SIDE = 16384
MAX_IMAGE_PIXELS = 2**27
_READ = "PNG, JPEG and WebP are read"
_TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_SAMPLE_BITS = (8, 10, 12, 14, 16)


KEPT_BLOCKS = 8
"""Blocks of memory that Pillow keeps for its next pictures, in place of asking the system for fresh pages each time."""
Image.core.set_blocks_max(KEPT_BLOCKS)

# --- bytes -> upright RGB ---------------------------------------------------------------------------------------------


def read_picture(data: bytes, what: str = "image") -> Image.Image:
    """Return a PNG, JPEG or WebP file from an untrusted source as an upright RGB picture.

    No other decoder is tried, and the declared size is checked before a pixel is decoded.

    Args:
        data: bytes of the file.
        what: name of the picture in the error.

    Raises:
        SampleError: bytes that are no such picture (reason `broken_image`) or that declare too many pixels
            (`image_too_large`). The text is the same in every run.
    """
    image, chunks = _open(data, what)
    orientation = _orientation(image)
    try:
        if image.format == "PNG" and data[24:25] == b"\x10":
            image = _from_sixteen_bits(image, data, chunks)
        elif _is_transparent(image):
            image = _on_white(image, data)
        elif image.mode == "RGB":
            image.load()
        else:
            image = image.convert("RGB")
    except Exception as error:  # PIL raises many types; each of them means this one picture is unusable
        raise _unreadable(data, what, error) from None
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def picture_size(data: bytes, what: str = "image") -> tuple[int, int]:
    """Return (width, height) of the picture that `read_picture` makes, from the header alone.

    Raises:
        SampleError: as in `read_picture`, for a fault that the header shows.
    """
    image, _ = _open(data, what)
    width, height = image.size
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def _open(data: bytes, what: str) -> tuple[Image.Image, dict[bytes, bytes]]:
    """Return the opened picture, no pixel decoded, and those chunks of a PNG that PIL ignores or reads too late."""
    try:
        image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+ pixels", str(error))
        raise _too_large(found[0] if found else str(error), what) from None
    except Exception as error:
        raise _unreadable(data, what, error) from None
    if max(image.size) > MAX_SIDE or image.width * image.height > MAX_IMAGE_PIXELS:
        raise _too_large(f"{image.width} x {image.height} pixels", what)
    chunks = _png_chunks(data) if image.format == "PNG" else {}
    if b"eXIf" in chunks:
        image.info["exif"] = chunks[b"eXIf"]
    return image, chunks


def _too_large(found: str, what: str) -> SampleError:
    return SampleError(
        f"{what} declares too many pixels ({found}); at most {MAX_SIDE} on a side and {MAX_IMAGE_PIXELS} in all",
        "image_too_large",
    )


def _unreadable(data: bytes, what: str, error: Exception) -> SampleError:
    text = f"{what} cannot be decoded: {describe_start(data)}"
    if file_kind(data) in (PNG, JPEG, WEBP):
        text += ", damaged or cut short"
    if not isinstance(error, Image.UnidentifiedImageError):  # its text has a memory address
        text += f" ({re.sub(r' at 0x[0-9a-fA-F]+', '', str(error))})"
    return SampleError(f"{text}; {_READ}", "broken_image")


def _png_chunks(data: bytes) -> dict[bytes, bytes]:
    found, place = {}, 8
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if name in (b"eXIf", b"sBIT"):
            found.setdefault(name, data[place + 8 : place + 8 + length])
        place += 12 + length
    return found


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened picture, 1 where there is none that can be read.

    The base class's method is called, because that of a PNG decodes the pixels to find metadata behind them.
    """
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return int(value) if value in _TURNS else 1
    except Exception:  # PIL raises many types for broken metadata, which does not make the pixels unusable
        return 1


# --- transparency and 16 bits -----------------------------------------------------------------------------------------


def _is_transparent(image: Image.Image) -> bool:
    return "transparency" in image.info or "A" in image.getbands()


def _on_white(image: Image.Image, data: bytes) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and data[24] < 8:  # PIL stretches the pixels but not the key
        image.info["transparency"] = key * 255 // (2 ** data[24] - 1)
    image = image.convert("RGBA")
    return _pasted_on_white(image, image.getchannel("A"))


def _pasted_on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    result = Image.new("RGB", image.size, "white")
    result.paste(image, mask=alpha)
    return result


def _from_sixteen_bits(image: Image.Image, data: bytes, chunks: dict[bytes, bytes]) -> Image.Image:
    """Return a PNG of 16 bits per sample as RGB of 8.

    Many cameras and scanners store 8 to 14 bits in the low end of 16. The samples are therefore scaled by the least of
    8, 10, 12, 14 and 16 bits that holds the largest of them, or by the bits that the chunk sBIT names if these are
    more. A sample of the full range is divided by 257.
    """
    samples, alpha, key = _sixteen_bit_samples(image, data), None, image.info.get("transparency")
    if samples.shape[2] in (2, 4):
        samples, alpha = samples[..., :-1], samples[..., -1]
    elif key is not None:
        alpha = np.where((samples == np.asarray(key)).all(axis=2), 0, 65535)
    largest, named = int(samples.max()), max(chunks.get(b"sBIT") or b"\0")
    bits = max(next(bits for bits in _SAMPLE_BITS if largest < 2**bits), min(named, 16))
    levels = np.broadcast_to(_to_levels(samples, bits), (*samples.shape[:2], 3))
    picture = Image.fromarray(np.ascontiguousarray(levels))
    return picture if alpha is None else _pasted_on_white(picture, Image.fromarray(_to_levels(alpha, 16)))


def _to_levels(samples: np.ndarray, bits: int) -> np.ndarray:
    """Return samples of so many bits as uint8, rounded."""
    top = 2**bits - 1
    return ((samples.astype(np.uint32) * 510 + top) // (2 * top)).astype(np.uint8)


def _sixteen_bit_samples(image: Image.Image, data: bytes) -> np.ndarray:
    """Return [H, W, channels] uint16; PIL has no modes for more than one channel of them, so bytes are decoded."""
    if image.mode == "I;16":
        return np.asarray(image)[..., None]
    if data[25] == 4:  # grey and alpha, four bytes
        parts = _decode_as(data, "RGBA")
        return parts[..., ::2] << 8 | parts[..., 1::2]
    return _decode_as(data, f"{image.mode};16B") << 8 | _decode_as(data, f"{image.mode};16L")


def _decode_as(data: bytes, rawmode: str) -> np.ndarray:
    """Return a PNG decoded with another layout of its bytes in memory, [H, W, channels] uint16."""
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    image.tile = [image.tile[0]._replace(args=rawmode)]
    return np.asarray(image, dtype=np.uint16)

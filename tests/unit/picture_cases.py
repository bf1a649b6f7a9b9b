"""Picture files of every kind that people bring: the pixels they must show, or the message they must get."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)
SIDE = 56


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(samples, bits: int, colour_type: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a PNG of [H, W, channels] samples, with chunks before and after the pixels."""
    samples = np.asarray(samples)
    height, width = samples.shape[:2]
    if bits == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    elif bits == 8:
        rows = samples.astype(np.uint8).reshape(height, -1)
    else:
        flags = (samples.reshape(height, width, 1) >> np.arange(bits)[::-1]) & 1
        rows = np.packbits(flags.reshape(height, -1).astype(np.uint8), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), before, chunk(b"IDAT", zlib.compress(lines)), after]
    return b"".join(parts) + chunk(b"IEND", b"")


def plane(left, right, channels: int = 1) -> np.ndarray:
    """Return samples with one value in the left half and another in the right half."""
    result = np.zeros((SIDE, SIDE, channels), dtype=np.int64)
    result[:, : SIDE // 2], result[:, SIDE // 2 :] = left, right
    return result


def halves(mode: str, left, right) -> Image.Image:
    image = Image.new(mode, (SIDE, SIDE), left)
    image.paste(right, (SIDE // 2, 0, SIDE, SIDE))
    return image


def exif(orientation: object, order: str = ">", kind: int = 3) -> bytes:
    """Return EXIF data with one entry of the given type (3: a short number)."""
    mark = b"MM\0*" if order == ">" else b"II*\0"
    value = struct.pack(f"{order}HH", orientation, 0) if isinstance(orientation, int) else orientation
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    return mark + struct.pack(f"{order}IH", 8, 1) + entry + struct.pack(f"{order}I", 0)


def _palette(*alphas: int) -> bytes:
    return chunk(b"PLTE", bytes([*RED, *BLUE, *BLACK])) + chunk(b"tRNS", bytes(alphas))


def _animated(kind: str) -> bytes:
    first, second = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue"))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encoded(first, kind, save_all=True, append_images=[second], duration=100, **lossless)


def _adobe_cmyk() -> bytes:
    """Return a JPEG as Photoshop writes it: inverted, with Adobe's marker."""
    image = Image.merge("CMYK", [Image.new("L", (SIDE, SIDE), value) for value in (0, 255, 255, 0)])
    return encoded(image, "JPEG", quality=100)


LEFT_RIGHT = {
    # --- 16 bits per sample
    "grey 16, full range": (png(plane(0, 65535), 16, 0), BLACK, WHITE),
    "grey 16, a middle of the full range": (png(plane(32896, 65535), 16, 0), (128,) * 3, WHITE),
    "grey 16, 14 bits in it": (png(plane(8256, 16383), 16, 0), (129,) * 3, WHITE),
    "grey 16, 12 bits in it": (png(plane(2056, 4095), 16, 0), (128,) * 3, WHITE),
    "grey 16, 10 bits in it": (png(plane(514, 1023), 16, 0), (128,) * 3, WHITE),
    "grey 16, 8 bits in it": (png(plane(128, 255), 16, 0), (128,) * 3, WHITE),
    "grey 16, dark and said to be 12 bits": (
        png(plane(0, 257), 16, 0, before=chunk(b"sBIT", b"\x0c")),
        BLACK,
        (16,) * 3,
    ),
    "grey 16, dark and said to be 16 bits": (
        png(plane(0, 257), 16, 0, before=chunk(b"sBIT", b"\x10")),
        BLACK,
        (1,) * 3,
    ),
    "grey 16, a transparent key": (png(plane(7, 65535), 16, 0, before=chunk(b"tRNS", b"\0\x07")), WHITE, WHITE),
    "grey 16 and alpha": (png(plane((0, 0), (0, 65535), 2), 16, 4), WHITE, BLACK),
    "grey 16 and alpha, 12 bits in it": (png(plane((0, 65535), (4095, 65535), 2), 16, 4), BLACK, WHITE),
    "RGB 16, full range": (png(plane((65535, 0, 0), (0, 0, 32896), 3), 16, 2), RED, (0, 0, 128)),
    "RGB 16, 12 bits in it": (png(plane((4095, 0, 0), (0, 0, 2056), 3), 16, 2), RED, (0, 0, 128)),
    "RGB 16, a transparent key": (
        png(plane((1, 2, 3), (65535, 0, 0), 3), 16, 2, before=chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))),
        WHITE,
        RED,
    ),
    "RGBA 16": (png(plane((0, 0, 0, 0), (0, 0, 65535, 65535), 4), 16, 6), WHITE, BLUE),
    # --- transparency
    "RGBA": (encoded(halves("RGBA", (0, 0, 0, 0), (*RED, 255))), WHITE, RED),
    "RGBA, half transparent": (encoded(halves("RGBA", (0, 0, 0, 128), (*RED, 64))), (127,) * 3, (255, 191, 191)),
    "LA": (encoded(halves("LA", (0, 0), (0, 255))), WHITE, BLACK),
    "palette, one clear colour": (png(plane(0, 1), 8, 3, before=_palette(0)), WHITE, BLUE),
    "palette, an alpha for each colour": (png(plane(0, 1), 8, 3, before=_palette(255, 102)), RED, (153, 153, 255)),
    "palette of 2 bits": (png(plane(2, 0), 2, 3, before=_palette(255, 255, 0)), WHITE, RED),
    "palette without transparency": (encoded(halves("RGB", "red", "blue").quantize(2)), RED, BLUE),
    "grey, a transparent key": (png(plane(7, 8), 8, 0, before=chunk(b"tRNS", b"\0\x07")), WHITE, (8,) * 3),
    "grey of 2 bits, a transparent key": (png(plane(1, 2), 2, 0, before=chunk(b"tRNS", b"\0\1")), WHITE, (170,) * 3),
    "black and white, a transparent key": (png(plane(0, 1), 1, 0, before=chunk(b"tRNS", b"\0\0")), WHITE, WHITE),
    "RGB, a transparent key": (
        png(plane(BLACK, RED, 3), 8, 2, before=chunk(b"tRNS", bytes(6))),
        WHITE,
        RED,
    ),
    "WebP with alpha": (
        encoded(halves("RGBA", (0, 0, 0, 0), (*BLUE, 255)), "WEBP", lossless=True, exact=True),
        WHITE,
        BLUE,
    ),
    # --- others
    "black and white": (encoded(halves("1", 0, 1)), BLACK, WHITE),
    "grey": (encoded(halves("L", 17, 200)), (17,) * 3, (200,) * 3),
    "RGB": (encoded(halves("RGB", "red", "blue")), RED, BLUE),
    "animated PNG": (_animated("PNG"), RED, RED),
    "animated WebP": (_animated("WEBP"), RED, RED),
    "CMYK of Adobe": (_adobe_cmyk(), RED, RED),
    "grey JPEG": (encoded(Image.new("L", (SIDE, SIDE), 77), "JPEG"), (77,) * 3, (77,) * 3),
}
"""Kind -> (file of 56 x 56 pixels, colour of its left half, colour of its right half)."""


def _marked() -> Image.Image:
    """Return an upright picture of 84 x 56 pixels that is red in its upper left 28 x 28 pixels."""
    image = Image.new("RGB", (84, 56), "blue")
    image.paste("red", (0, 0, 28, 28))
    return image


_LYING = {  # orientation -> what a camera held that way stores of an upright picture
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(orientation: int) -> Image.Image:
    return _marked().transpose(_LYING[orientation]) if orientation in _LYING else _marked()


def _turned_png(orientation: int, **place) -> bytes:
    pixels = np.asarray(stored(orientation))
    return png(pixels, 8, 2, **{where: chunk(b"eXIf", exif(orientation)) for where in place})


def _png_with_text(key: str, value: str) -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt(key, value)
    return encoded(stored(6), pnginfo=texts)


JPEG_EXIF = b"Exif\0\0"
TURNED = {
    **{
        f"JPEG, orientation {number}": encoded(
            stored(number), "JPEG", quality=95, subsampling=0, exif=JPEG_EXIF + exif(number)
        )
        for number in range(1, 9)
    },
    **{f"PNG, orientation {number}": _turned_png(number, before=True) for number in (3, 5, 6, 8)},
    **{
        f"WebP, orientation {number}": encoded(stored(number), "WEBP", lossless=True, exif=exif(number))
        for number in (2, 4, 6, 7)
    },
    "PNG, EXIF behind the pixels": _turned_png(6, after=True),
    "JPEG, little-endian": encoded(stored(6), "JPEG", quality=95, subsampling=0, exif=JPEG_EXIF + exif(6, "<")),
    "PNG, orientation in XMP": _png_with_text("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>'),
    "no EXIF": encoded(stored(1)),
    "orientation 0": encoded(stored(1), "JPEG", quality=95, subsampling=0, exif=JPEG_EXIF + exif(0)),
    "orientation 9": encoded(stored(1), "JPEG", quality=95, subsampling=0, exif=JPEG_EXIF + exif(9)),
    "orientation as text": encoded(
        stored(1), "JPEG", quality=95, subsampling=0, exif=JPEG_EXIF + exif(b"6\0\0\0", kind=2)
    ),
    "EXIF that is garbage": encoded(stored(1), "JPEG", quality=95, subsampling=0, exif=JPEG_EXIF + b"\xff" * 40),
    "EXIF cut short": encoded(stored(1), "JPEG", quality=95, subsampling=0, exif=JPEG_EXIF + exif(6)[:13]),
    "EXIF of a PNG that is garbage": png(np.asarray(stored(1)), 8, 2, before=chunk(b"eXIf", b"\0" * 9)),
}
"""Kind -> file whose upright picture is `_marked`."""

_PHOTO = encoded(Image.effect_noise((SIDE, SIDE), 50), "JPEG")
_AVIF = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(64)
_CUT = ", damaged or cut short"
REFUSED = {
    "HTML": (b"<!DOCTYPE html><html>404</html>", "b'<!DOCTYPE ht' (HTML, such as the error page of a download)"),
    "HTML after a line": (b"\n\n<html></html>", r"b'\n\n<html></ht' (HTML, such as the error page of a download)"),
    "AVIF": (_AVIF, r"b'\x00\x00\x00\x1cftypavif' (an AVIF picture)"),
    "HEIC": (_AVIF.replace(b"ftypavif", b"ftypheic"), r"b'\x00\x00\x00\x1cftypheic' (a HEIC picture)"),
    "mp4": (_AVIF.replace(b"ftypavif", b"ftypisom"), r"b'\x00\x00\x00\x1cftypisom' (an mp4 or mov video)"),
    "GIF": (b"GIF89a" + encoded(stored(1), "GIF")[6:], r"b'GIF89aT\x008\x00\x81\x00' (a GIF picture)"),
    "BMP": (b"BM\x46\0\0\0\0\0\0\0\x36\0\0\0", r"b'BMF\x00\x00\x00\x00\x00\x00\x006\x00' (a BMP picture)"),
    "TIFF": (b"II*\0\x08\0\0\0\x0a\0\0\1" + bytes(40), r"b'II*\x00\x08\x00\x00\x00\n\x00\x00\x01' (a TIFF picture)"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), r"b'\x00\x00\x00\x0cjP  \r\n\x87\n' (a JPEG 2000 picture)"),
    "SVG after a comment": (b"<!-- x --><svg/>", "b'<!-- x --><s' (an SVG drawing)"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "b'<svg xmlns=\"' (an SVG drawing)"),
    "PDF": (b"%PDF-1.7 " + bytes(40), r"b'%PDF-1.7 \x00\x00\x00' (a PDF document)"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "b'version http' (a Git LFS pointer, not the file itself)",
    ),
    "JSON": (b'{"error": "not found"}', 'b\'{"error": "n\' (JSON)'),
    "zip": (b"PK\x03\x04" + bytes(20), r"b'PK\x03\x04\x00\x00\x00\x00\x00\x00\x00\x00' (a zip archive)"),
    "zeros": (bytes(100), r"b'" + r"\x00" * 12 + "'"),
    "JPEG cut short": (
        _PHOTO[:-200],
        r"b'\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01' (a JPEG picture)"
        f"{_CUT} (image file is truncated (N bytes not processed))",
    ),
    "JPEG, its header alone": (_PHOTO[:20], r"b'\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01' (a JPEG picture)" + _CUT),
    "PNG cut short": (
        encoded(Image.effect_noise((SIDE, SIDE), 50))[:900],
        r"b'\x89PNG\r\n\x1a\n\x00\x00\x00\r' (a PNG picture)" f"{_CUT} (image file is truncated)",
    ),
    "WebP cut short": (
        b"RIFF\x90\1\0\0" + encoded(stored(1), "WEBP")[8:60],
        rf"b'RIFF\x90\x01\x00\x00WEBP' (a WebP picture){_CUT} (could not create decoder object)",
    ),
}
"""Kind -> (file, the message between `its bytes begin with ` and `; PNG, JPEG and WebP are read`)."""

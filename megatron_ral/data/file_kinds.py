"""Kinds of files by their first bytes, for messages about bytes that cannot be read."""

PNG, JPEG, WEBP = "a PNG picture", "a JPEG picture", "a WebP picture"
_KINDS = (
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"\xff\xd8", JPEG),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"8BPS", "a Photoshop picture"),
    (b"\0\0\x01\0", "an icon"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"DDS ", "a DDS picture"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"data:", "a data: URL as text"),
    (b"http", "a URL as text"),
    (b"{", "JSON"),
)
_BRANDS = {  # of the ISO base media file format, in bytes 8 to 12
    b"avif": "an AVIF picture",
    b"avis": "an AVIF picture",
    b"heic": "a HEIC picture",
    b"heix": "a HEIC picture",
    b"hevc": "a HEIC picture",
    b"mif1": "a HEIF picture",
    b"msf1": "a HEIF picture",
}
_SHOWN = 12


def describe_start(data: bytes) -> str:
    """Return a clause that names the first bytes of a file and the kind they tell, the same in every run."""
    if not data:
        return "it is empty (0 bytes)"
    kind = file_kind(data)
    return f"its bytes begin with {data[:_SHOWN]!r}" + (f" ({kind})" if kind else "")


def file_kind(data: bytes) -> str:
    """Return the kind of a file with its article, empty where the first bytes do not tell."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "an mp4 or mov video")
    if data[:4] == b"RIFF":
        return {b"WEBP": WEBP, b"AVI ": "an AVI video", b"WAVE": "sound"}.get(data[8:12], "")
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<") and b"<svg" in text and b"<html" not in text:
        return "an SVG drawing"
    if text.startswith(b"<"):
        return "XML" if text.startswith(b"<?xml") else "HTML, such as the error page of a download"
    return next((kind for start, kind in _KINDS if data.startswith(start)), "")

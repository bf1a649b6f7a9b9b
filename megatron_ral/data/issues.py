"""What can be wrong with data: a whole source (`DataError`, the run ends) or one sample (`SampleError`, it is put aside)."""

from dataclasses import dataclass

REASONS = {
    "truncated": "the shard is cut short or damaged there",
    "unsafe_member": "a tar member that is no plain file, or whose name leads out of the archive",
    "duplicate_key": "the key was used before in the shard or the data set",
    "unreadable_text": "text or JSON that cannot be read",
    "missing_field": "a needed field is missing",
    "wrong_field": "a field has the wrong type or shape",
    "missing_media": "an image or video is named but not there",
    "refused_path": "a media path that is a URL or leads out of the media folder",
    "answer_not_in_options": "the reference answer is none of the options",
    "target_box": "a target box or span that no part of the image or video can be",
    "broken_image": "an image that cannot be decoded or used",
    "image_too_large": "an image whose header declares too many pixels",
    "broken_video": "a video that cannot be decoded, or without frames",
    "special_token": "text that contains a special token of the model",
    "token_mismatch": "visual tokens in the text and visual features differ in number",
    "prompt_too_long": "more tokens than data.max_prompt_length",
    "too_many_visual_tokens": "more visual tokens than data.max_visual_tokens",
    "cannot_read": "the disk refused to give the bytes",
    "unusable": "anything else",
}


class SampleError(ValueError):
    """A sample that cannot be used; the loader quarantines it under its key and goes on.

    Args:
        text: a sentence that names the key.
        reason: one of REASONS, for counting.
    """

    def __init__(self, text: str, reason: str = "unusable"):
        assert reason in REASONS, reason
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class SampleIssue:
    """Why one sample or shard is not used."""

    reason: str
    """One of REASONS."""
    text: str


def printable(name: str) -> str:
    """A name from an archive with what is no text escaped, so that it can be printed and written anywhere."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")

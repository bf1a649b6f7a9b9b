"""Errors of one sample, and their kinds.

One sample that cannot be used raises `SampleError`; the loader puts it aside and goes on. A source that cannot be used
as a whole raises `megatron_ral.errors.DataError` instead, and the run ends.
"""

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
    "unusable_answer": "a reference answer that no response can match",
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
"""Reason of a fault -> its meaning. The keys stand in indexes, checkpoints and tags of the log."""


class SampleError(ValueError):
    """A sample that cannot be used.

    Readers of a single picture, clip, annotation or record do not know the sample's key. They raise this error with the
    bare fault, and the caller puts the key before it (`of_sample`).

    Args:
        text: a sentence that names the fault.
        reason: key of REASONS, for counting.
    """

    def __init__(self, text: str, reason: str = "unusable"):
        assert reason in REASONS, reason
        super().__init__(text)
        self.reason = reason

    def of_sample(self, key: str) -> "SampleError":
        """Return the same error with the sample's key before its text."""
        return SampleError(f"sample '{key}': {self}", self.reason)


@dataclass(frozen=True)
class SampleIssue:
    """Reason for which one sample, or the rest of a shard, is not used."""

    reason: str
    """Key of REASONS."""
    text: str
    """Sentence that names the sample or shard and its fault."""


def printable(name: str) -> str:
    """Return a name from an archive with undecodable bytes escaped, so that it can be printed and written anywhere."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")

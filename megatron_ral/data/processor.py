"""Sample -> Prompt: chat template, image tokens, rotary positions, target cells.

The image processor is Hugging Face's Qwen2-VL one in its PIL backend (no torchvision), the tokenizer whatever the
checkpoint folder holds. Image tokens are counted here, before any truncation could be thought of, so that a mismatch is
found where the sample's key is known.
"""

import io

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_ral.config import ConfigError
from megatron_ral.functional.positions import multimodal_positions
from megatron_ral.types import Prompt, Sample

END_OF_TURN = "<|im_end|>"


class SampleError(ValueError):
    """A sample that cannot be used; the loader quarantines it under its key and goes on."""


class PromptProcessor:
    """Turns samples into prompts for one checkpoint folder.

    Args:
        path: Hugging Face folder with config, tokenizer and image processor.
        max_prompt_length: tokens, visual tokens included; a longer prompt raises SampleError.

    Raises:
        ConfigError: no usable tokenizer or image processor in the folder.
    """

    def __init__(self, path: str, max_prompt_length: int):
        try:
            config = AutoConfig.from_pretrained(path)
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"'{path}' holds no usable tokenizer and image processor "
                              f"({' '.join(str(error).split())[:200]})") from None
        self.max_prompt_length = max_prompt_length
        self.image_token_id = config.image_token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(config.image_token_id)
        self.merge_size = config.vision_config.spatial_merge_size
        self.pixel_width = (config.vision_config.in_channels * config.vision_config.temporal_patch_size
                            * config.vision_config.patch_size**2)
        self.end_token_id = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.pad_token_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        if self.end_token_id is None or self.end_token_id == self.tokenizer.unk_token_id:
            raise ConfigError(f"the tokenizer in '{path}' has no {END_OF_TURN} token")

    def __call__(self, sample: Sample) -> Prompt:
        """Raises SampleError naming the key when the image cannot be decoded, does not match its tokens, the prompt
        is too long, or a box lies outside the image."""
        images = [self._decode(sample, data) for data in sample.images]
        if images:
            features = self.image_processor(images=images, return_tensors="pt")
            pixel_values, grids = features["pixel_values"], features["image_grid_thw"]
        else:
            pixel_values, grids = torch.zeros(0, self.pixel_width), torch.zeros(0, 3, dtype=torch.int64)
        tokens_per_image = (grids.prod(dim=1) // self.merge_size**2).tolist()
        input_ids = torch.tensor(self._tokenize(sample, tokens_per_image))
        visual_mask = input_ids == self.image_token_id
        if int(visual_mask.sum()) != sum(tokens_per_image):
            raise SampleError(f"sample '{sample.key}': {int(visual_mask.sum())} image tokens in the text but "
                              f"{sum(tokens_per_image)} visual features")
        if len(input_ids) > self.max_prompt_length:
            raise SampleError(f"sample '{sample.key}': prompt of {len(input_ids)} tokens is longer than "
                              f"data.max_prompt_length = {self.max_prompt_length}")
        position_ids, next_position = multimodal_positions(visual_mask, grids, self.merge_size)
        response = self.tokenizer(sample.process + sample.solution, add_special_tokens=False)["input_ids"]
        return Prompt(
            sample=sample, input_ids=input_ids, position_ids=position_ids, next_position=next_position,
            pixel_values=pixel_values, image_grid_thw=grids, visual_mask=visual_mask,
            target_mask=self._target_mask(sample, images, grids, visual_mask),
            response_ids=torch.tensor(response + [self.end_token_id]),
        )

    def decode(self, token_ids: Tensor) -> str:
        """Text of a response, special tokens removed."""
        return self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    def _decode(self, sample: Sample, data: bytes) -> Image.Image:
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except Exception as error:  # PIL raises many types; each of them means this one picture is unusable
            raise SampleError(f"sample '{sample.key}': image cannot be decoded ({error})") from None

    def _tokenize(self, sample: Sample, tokens_per_image: list[int]) -> list[int]:
        if self.image_token in sample.problem:
            raise SampleError(f"sample '{sample.key}': the problem text itself contains {self.image_token}; its image "
                              f"tokens would not match the {sum(tokens_per_image)} visual features")
        content = [{"type": "image"} for _ in tokens_per_image] + [{"type": "text", "text": sample.problem}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                  add_generation_prompt=True)
        pieces = text.split(self.image_token)
        if len(pieces) != len(tokens_per_image) + 1:
            raise SampleError(f"sample '{sample.key}': the chat template made {len(pieces) - 1} image places for "
                              f"{len(tokens_per_image)} images")
        expanded = pieces[0]
        for count, piece in zip(tokens_per_image, pieces[1:]):
            expanded += self.image_token * count + piece
        return self.tokenizer(expanded, add_special_tokens=False)["input_ids"]

    def _target_mask(self, sample: Sample, images: list, grids: Tensor, visual_mask: Tensor) -> Tensor:
        """Visual tokens of the first image whose centre lies in a target box."""
        mask = torch.zeros_like(visual_mask)
        if not sample.target_boxes or not images:
            return mask
        width, height = images[0].size
        rows, columns = int(grids[0, 1]) // self.merge_size, int(grids[0, 2]) // self.merge_size
        centre_y = (torch.arange(rows) + 0.5) * height / rows
        centre_x = (torch.arange(columns) + 0.5) * width / columns
        cells = torch.zeros(rows, columns, dtype=torch.bool)
        for x0, y0, x1, y1 in sample.target_boxes:
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise SampleError(f"sample '{sample.key}': target box {(x0, y0, x1, y1)} is not inside the image of "
                                  f"{width} x {height} pixels")
            cells |= ((centre_y >= y0) & (centre_y < y1))[:, None] & ((centre_x >= x0) & (centre_x < x1))[None, :]
        first_image = visual_mask.nonzero()[: rows * columns, 0]
        mask[first_image] = cells.flatten()
        return mask

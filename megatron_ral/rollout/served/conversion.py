"""Prompts in the form in which a sampler's server gets them, and its answers in the form of all samplers."""

from typing import Sequence

import numpy as np
import torch

from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.functional.patches import check_levels
from megatron_ral.functional.sampling import stream_seed
from megatron_ral.rollout.served.request import SampledGroup, SamplingRequest
from megatron_ral.types import Prompt, PromptBatch, ResponseBatch


def sampling_request(
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    identity: tuple[object, ...],
    forbidden: Sequence[int],
    pixels: tuple[Sequence[float], Sequence[float]],
) -> SamplingRequest:
    """Return the request for responses to some prompts.

    Args:
        prompts: Prompts.
        settings: Settings of the draws.
        identity: Key of the random streams. A response's seed is that of the native sampler's stream.
        forbidden: Tokens that are never drawn.
        pixels: Mean and standard deviation of each channel, with which pixels were normalised.

    Raises:
        ValueError: A prompt holds what cannot be sent.
    """
    patches = []
    for prompt in prompts:
        name = prompt.sample.identity
        if bool(prompt.is_video.any()):
            raise ValueError(f"cannot see the video of sample '{name}', because videos are not sent; set native")
        try:
            for part in prompt.patches:
                check_levels(part.levels, *pixels)
                patches.append(part.ordered_bytes)
        except ValueError as error:
            raise ValueError(f"cannot see the picture of sample '{name}', which has {error}") from None
    seeds = [
        [stream_seed(*identity, prompt.sample.identity, number) for number in range(settings.group_size)]
        for prompt in prompts
    ]
    return SamplingRequest(
        [(len(prompt.input_ids), len(prompt.grid_thw), prompt.num_patches) for prompt in prompts],
        torch.cat([prompt.input_ids for prompt in prompts]).numpy().astype(np.int32),
        torch.cat([prompt.grid_thw for prompt in prompts]).numpy().astype(np.int64),
        torch.cat(patches).numpy() if patches else np.zeros((0, 0), np.uint8),
        np.array(seeds, np.uint64),
        {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_length": settings.max_response_length,
            "end_token": settings.end_token_id,
            "forbidden": list(forbidden),
            "num_tokens": settings.num_tokens,
        },
    )


def response_batch(batch: PromptBatch, rows: Sequence[SampledGroup], settings: SamplingSettings) -> ResponseBatch:
    """Return responses in the form of all samplers, padded to the longest.

    Args:
        batch: B prompts.
        rows: Responses of each prompt.
        settings: Settings of the draws.
    """
    lengths = torch.tensor([list(row.lengths) for row in rows])
    shape = (*lengths.shape, int(lengths.max()))
    ids, logprobs = torch.full(shape, settings.pad_token_id), torch.zeros(shape)
    for b, row in enumerate(rows):
        mask = torch.arange(shape[-1]) < lengths[b][:, None]
        ids[b][mask] = torch.from_numpy(row.tokens.astype(np.int64))
        logprobs[b][mask] = torch.from_numpy(row.logprobs.astype(np.float32))
    return ResponseBatch(batch, ids, lengths, logprobs, torch.tensor([list(row.ended) for row in rows]))

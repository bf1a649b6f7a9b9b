"""Other settings: what would make a rehearsal fit, and which layouts promise most."""

from dataclasses import dataclass, replace
from typing import Any, Iterator, Mapping

from tqdm import tqdm

from megatron_ral.config import RunConfig
from megatron_ral.errors import ConfigError
from megatron_ral.models.shape import ModelShape
from megatron_ral.planning.hardware import Hardware
from megatron_ral.planning.rehearse import Rehearsal, check_possible, rehearse
from megatron_ral.planning.parameters import stage_parameters

Settings = Mapping[str, Any]


def with_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """The configuration with `section.key` set otherwise."""
    for key, value in settings.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def text(settings: Settings) -> str:
    """As overrides of a command line."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    )


def _smaller(result: Rehearsal) -> Iterator[Settings]:
    """Settings that take less memory where the peak is, cheapest first; each comes on top of those before."""
    config, phase = result.config, max((report.peak for report in result.ranks), key=lambda peak: peak[1])[0]
    parallel = config.parallel
    if phase in ("generation", "vision") and config.rollout.generation_batch_size > 1:
        yield {"rollout.generation_batch_size": max(1, result.work.generation_batch // 4)}
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    if phase == "update" and result.work.micro_batch > 1:
        yield {"train.micro_batch_size": 1}
    if phase == "update" and not parallel.recompute_activations:
        yield {"parallel.recompute_activations": True}
    if not parallel.offload_optimizer:
        yield {"parallel.offload_optimizer": True}
    if config.rollout.generation_batch_size > 1 and phase not in ("generation", "vision"):
        yield {"rollout.generation_batch_size": 1}
    if parallel.gather == "stage" and result.layout.data_size > 1:
        yield {"parallel.gather": "layer"}
    if not parallel.offload_parameters:
        yield {"parallel.offload_parameters": True}
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        yield {f"parallel.{key}": 2 * getattr(parallel, key)}


def find_way_out(
    result: Rehearsal, shape: ModelShape, visual_tokens: int = -1, tries: int = 8
) -> tuple[dict[str, Any], Rehearsal]:
    """Settings that make it fit, each of which took something off the peak, and the rehearsal with them, which `fits`
    where some were found."""
    settings: dict[str, Any] = {}
    while not result.fits and tries:
        for candidate in _smaller(result):
            tries -= 1
            try:
                other = rehearse(
                    with_settings(result.config, candidate),
                    shape,
                    result.layout.world_size,
                    result.hardware,
                    visual_tokens=visual_tokens,
                )
            except ConfigError:
                continue
            if other.peak_bytes < 0.98 * result.peak_bytes:
                settings, result = {**settings, **candidate}, other
                break
            if not tries:
                break
        else:
            break
    return settings, result


def way_out(result: Rehearsal, shape: ModelShape, visual_tokens: int = -1) -> str:
    """What would make it fit, as a sentence."""
    settings, other = find_way_out(result, shape, visual_tokens)
    if other.fits:
        return (
            f"it fits with {text(settings)}: {other.peak_bytes / 2**30:.1f} GiB, "
            f"{other.prompts_per_day:,.0f} prompts per day"
        )
    tried = f" with {text(settings)} it still takes {other.peak_bytes / 2**30:.1f} GiB;" if settings else ""
    return f"no setting that was tried makes it fit;{tried} take more ranks or shorter sequences"


@dataclass(frozen=True)
class _Candidate:
    settings: Settings
    config: RunConfig
    promise: float
    """Rough cost: the share of time that is not lost to bubbles, recomputation and communication, upside down."""
    certain: float
    """Bytes of parameters, gradients and optimizer state, by arithmetic."""
    kept: float
    """What an update keeps of its passes, in layers x prompts of one rank; bytes of one are learnt from rehearsals."""

    @property
    def recomputes(self) -> bool:
        return self.config.parallel.recompute_activations


def _candidates(config: RunConfig, shape: ModelShape, world_size: int, hardware: Hardware) -> Iterator[_Candidate]:
    itemsize = 2 if config.model.dtype == "bfloat16" else 4
    for tensor in (size for size in range(1, 9) if shape.num_attention_heads % size == 0):
        for pipeline in (
            size
            for size in range(1, min(shape.num_layers, world_size // tensor) + 1)
            if shape.num_layers % size == 0 and world_size % (tensor * size) == 0 and size <= 16
        ):
            for micro in (1, 2, 4):
                for recompute in (False, True):
                    settings = {
                        "parallel.tensor_model_parallel_size": tensor,
                        "parallel.pipeline_model_parallel_size": pipeline,
                        "train.micro_batch_size": micro,
                        "parallel.recompute_activations": recompute,
                        "parallel.sequence_parallel": tensor > 1,
                    }
                    changed = with_settings(config, settings)
                    try:
                        layout = check_possible(changed, shape, world_size)
                    except ConfigError:
                        continue
                    of_update = (
                        config.train.batch_size
                        if config.train.algorithm == "sft"
                        else config.rollout.num_prompts // config.rollout.num_minibatches
                    )
                    per_update = of_update // layout.data_size
                    if micro > per_update:
                        continue
                    stage = max(stage.per_tensor_rank for stage in stage_parameters(shape, layout))
                    certain = stage * (itemsize + 4) + stage / layout.data_size * (16 + 2 * itemsize)
                    if certain > hardware.usable_bytes:
                        continue
                    micro_batches = per_update // micro
                    bubble = (micro_batches + pipeline - 1) / micro_batches
                    kept = micro * min(pipeline, micro_batches) * shape.num_layers / pipeline / tensor
                    yield _Candidate(
                        settings, changed, bubble * (4 / 3 if recompute else 1) * (1 + 0.04 * tensor), certain, kept
                    )


def search(
    config: RunConfig, shape: ModelShape, world_size: int, hardware: Hardware, visual_tokens: int = -1, tries: int = 10
) -> str:
    """The five layouts that fit and promise the most prompts per day, as a table.

    Layouts whose parameters and gradients alone do not fit are left out by arithmetic; of the others the `tries` that a
    rough estimate puts first are rehearsed, without those that clearly cannot fit by what the ones before took.
    """
    candidates = sorted(_candidates(config, shape, world_size, hardware), key=lambda candidate: candidate.promise)
    fitting, rehearsed, hopeless = [], 0, 0
    bytes_kept: dict[bool, float] = {}
    with tqdm(total=min(tries, len(candidates)), desc="layouts", unit="layout") as bar:
        for candidate in candidates:
            least = candidate.certain + bytes_kept.get(candidate.recomputes, 0.0) * candidate.kept
            if least > 1.1 * hardware.usable_bytes:
                hopeless += 1
                continue
            if rehearsed == tries:
                break
            result = rehearse(candidate.config, shape, world_size, hardware, visual_tokens=visual_tokens)
            rehearsed += 1
            bar.update()
            update = max(report.memory["update"].total() for report in result.ranks)
            each = max(update - candidate.certain, 0.0) / candidate.kept
            bytes_kept[candidate.recomputes] = min(each, bytes_kept.get(candidate.recomputes, each))
            if result.fits:
                fitting.append((result, candidate.settings))
    lines = [
        f"{len(candidates)} layouts of {world_size} ranks can hold their parameters and gradients; {rehearsed} "
        f"rehearsed, {len(fitting)} fit, {hopeless} left out because those before took too much"
    ]
    for result, settings in sorted(fitting, key=lambda pair: -pair[0].prompts_per_day)[:5]:
        lines.append(
            f"{result.prompts_per_day:>8,.0f} prompts per day, {result.peak_bytes / 2**30:5.1f} GiB: {text(settings)}"
        )
    if not fitting:
        lines.append("none fits: take more ranks, shorter sequences, or parallel.offload_optimizer=true")
    return "\n".join(lines)

"""Search for other settings: those with which a rehearsal fits, and the layouts that promise most prompts per day."""

from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Optional

from tqdm import tqdm

from megatron_ral.errors import ConfigError
from megatron_ral.models.shape import ModelShape
from megatron_ral.planning.hardware import Hardware
from megatron_ral.planning.launch_plan import LaunchPlan
from megatron_ral.planning.memory import BYTES, GIB
from megatron_ral.planning.parameters import stage_parameters
from megatron_ral.planning.rehearse import Rehearsal, check_possible, rehearse

Settings = Mapping[str, Any]
"""Values by dotted key."""


def text(settings: Settings) -> str:
    """Return settings as overrides of a command line."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    )


def _by_groups(plan: LaunchPlan) -> Settings:
    """Return the setting that micro-batches be cut by a number of groups, where the plan cuts them otherwise."""
    return {"train.tokens_per_micro_batch": 0} if plan.settings["train"]["tokens_per_micro_batch"] else {}


def _smaller(result: Rehearsal) -> Iterator[Settings]:
    """Yield settings that take less memory in the phase of the peak, cheapest first."""
    plan, phase = result.plan, max((report.peak for report in result.ranks), key=lambda peak: peak[1])[0]
    parallel, generates = plan.parallel, phase in ("generation", "vision")
    if generates and plan.generation_batch_size > 1:
        yield {"rollout.generation_batch_size": max(1, plan.work.generation_batch // 4)}
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    if phase == "update" and plan.work.micro_batch > 1:
        yield {"train.micro_batch_size": 1, **_by_groups(plan)}
    if phase == "update" and not parallel.recompute_activations:
        yield {"parallel.recompute_activations": True}
    if not parallel.offload_optimizer:
        yield {"parallel.offload_optimizer": True}
    if plan.generation_batch_size > 1 and not generates:
        yield {"rollout.generation_batch_size": 1}
    if parallel.gather == "stage" and plan.layout.data_size > 1:
        yield {"parallel.gather": "layer"}
    if not parallel.offload_parameters:
        yield {"parallel.offload_parameters": True}
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        yield {f"parallel.{key}": 2 * getattr(parallel, key)}


def find_way_out(result: Rehearsal, shape: ModelShape, tries: int = 8) -> tuple[dict[str, Any], Rehearsal]:
    """Return settings that make a launch fit, and the rehearsal with them.

    Every setting lowers the peak and comes on top of those before. The rehearsal does not fit where none were found.

    Args:
        result: rehearsal of a launch that does not fit.
        shape: model.
        tries: largest number of rehearsals.
    """
    settings: dict[str, Any] = {}
    while not result.fits and tries:
        for candidate in _smaller(result):
            tries -= 1
            try:
                other = rehearse(result.plan.changed(candidate), shape, result.hardware)
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


def way_out(result: Rehearsal, shape: ModelShape) -> str:
    """Return the settings that make a launch fit as a sentence."""
    settings, other = find_way_out(result, shape)
    if other.fits:
        return (
            f"it fits with {text(settings)}: {other.peak_bytes / GIB:.1f} GiB, "
            f"{other.prompts_per_day:,.0f} prompts per day"
        )
    tried = f" with {text(settings)} it still takes {other.peak_bytes / GIB:.1f} GiB;" if settings else ""
    return f"no setting that was tried makes it fit;{tried} take more ranks or shorter sequences"


@dataclass(frozen=True)
class _Candidate:
    """Layout that may fit, with a rough estimate."""

    settings: Settings
    plan: LaunchPlan
    cost: float
    """Rough time of an update: bubbles, recomputation and communication as factors."""
    certain: float
    """Bytes of parameters, gradients and optimizer state, by arithmetic."""
    stored: float
    """Activations that an update stores, in layers x prompts of one rank. Rehearsals tell the bytes of one."""


def _candidate(plan: LaunchPlan, shape: ModelShape, hardware: Hardware, settings: Settings) -> Optional[_Candidate]:
    """Return a candidate, or None where the settings are impossible or certainly do not fit."""
    try:
        changed = plan.changed(settings)
        check_possible(changed, shape)
    except ConfigError:
        return None
    layout, work, itemsize = changed.layout, changed.work, BYTES[plan.dtype]
    if work.micro_batch < settings["train.micro_batch_size"]:  # an update has fewer prompts
        return None
    stage = max(stage.per_tensor_rank for stage in stage_parameters(shape, layout))
    certain = stage * (itemsize + 4) + stage / layout.data_size * (16 + 2 * itemsize)
    if certain > hardware.usable_bytes:
        return None
    tensor, pipeline = layout.tensor_size, layout.pipeline_size
    bubble = (work.micro_batches + pipeline - 1) / work.micro_batches
    stored = work.micro_batch * min(pipeline, work.micro_batches) * shape.num_layers / pipeline / tensor
    recompute = 4 / 3 if changed.parallel.recompute_activations else 1
    return _Candidate(settings, changed, bubble * recompute * (1 + 0.04 * tensor), certain, stored)


def _candidates(plan: LaunchPlan, shape: ModelShape, hardware: Hardware) -> Iterator[_Candidate]:
    """Yield all layouts, batch sizes and recomputation that may fit."""
    world_size = plan.layout.world_size
    for tensor in (size for size in range(1, 9) if shape.num_attention_heads % size == 0):
        for pipeline in range(1, min(shape.num_layers, world_size // tensor, 16) + 1):
            if shape.num_layers % pipeline or world_size % (tensor * pipeline):
                continue
            for micro in (1, 2, 4):
                for recompute in (False, True):
                    settings = {
                        "parallel.tensor_model_parallel_size": tensor,
                        "parallel.pipeline_model_parallel_size": pipeline,
                        "train.micro_batch_size": micro,
                        **_by_groups(plan),
                        "parallel.recompute_activations": recompute,
                        "parallel.sequence_parallel": tensor > 1,
                    }
                    candidate = _candidate(plan, shape, hardware, settings)
                    if candidate is not None:
                        yield candidate


def search(plan: LaunchPlan, shape: ModelShape, hardware: Hardware, tries: int = 10) -> str:
    """Return a table of the five layouts that fit and promise the most prompts per day.

    Layouts whose parameters and gradients alone do not fit are left out by arithmetic. Of the others, the `tries` with
    the lowest rough cost are rehearsed, except those that clearly cannot fit given the rehearsals before.

    Args:
        plan: plan of a launch with the same ranks, whose layout is replaced.
        shape: model.
        hardware: machines of the launch.
        tries: largest number of rehearsals.
    """
    candidates = sorted(_candidates(plan, shape, hardware), key=lambda candidate: candidate.cost)
    fitting, rehearsed, hopeless = [], 0, 0
    bytes_stored: dict[bool, float] = {}
    with tqdm(total=min(tries, len(candidates)), desc="layouts", unit="layout") as bar:
        for candidate in candidates:
            recomputes = candidate.plan.parallel.recompute_activations
            least = candidate.certain + bytes_stored.get(recomputes, 0.0) * candidate.stored
            if least > 1.1 * hardware.usable_bytes:
                hopeless += 1
                continue
            if rehearsed == tries:
                break
            result = rehearse(candidate.plan, shape, hardware)
            rehearsed += 1
            bar.update()
            update = max(report.memory["update"].total() for report in result.ranks)
            each = max(update - candidate.certain, 0.0) / candidate.stored
            bytes_stored[recomputes] = min(each, bytes_stored.get(recomputes, each))
            if result.fits:
                fitting.append((result, candidate.settings))
    lines = [
        f"{len(candidates)} layouts of {plan.layout.world_size} ranks can hold their parameters and gradients; "
        f"{rehearsed} rehearsed, {len(fitting)} fit, {hopeless} left out because those before took too much"
    ]
    for result, settings in sorted(fitting, key=lambda pair: -pair[0].prompts_per_day)[:5]:
        lines.append(
            f"{result.prompts_per_day:>8,.0f} prompts per day, {result.peak_bytes / GIB:5.1f} GiB: {text(settings)}"
        )
    if not fitting:
        lines.append("none fits: take more ranks, shorter sequences, or parallel.offload_optimizer=true")
    return "\n".join(lines)

"""Rehearsal as text."""

from collections import Counter

from megatron_ral.planning.memory import GIB
from megatron_ral.planning.rehearse import RankReport, Rehearsal

KINDS = (
    "parameters",
    "gathered stage",
    "reference",
    "teacher",
    "gradients",
    "optimizer state",
    "activations",
    "KV cache",
    "attention rows",
    "logits",
    "visual features",
)


def describe(rehearsal: Rehearsal, row: bool = False) -> str:
    """Return every distinct rank and then the job as text, or with `row` one row of a Markdown table."""
    if row:
        return _row(rehearsal)
    layout, work = rehearsal.plan.layout, rehearsal.plan.work
    lines = [
        f"{layout.world_size} ranks = tensor {layout.tensor_size} x pipeline {layout.pipeline_size} x data "
        f"{layout.data_size}; {rehearsal.total_parameters:,} parameters",
        f"prompts of {work.prompt_length} tokens ({work.visual_tokens} visual), {work.group_size} responses of "
        f"{work.response_length}; one rank: {work.num_prompts} prompts per rollout, {work.num_updates} updates of "
        f"{work.micro_batches} micro-batches of {work.micro_batch}",
    ]
    for report in rehearsal.ranks:
        lines += ["", *_rank(report, rehearsal)]
    lines += ["", *_job(rehearsal)]
    return "\n".join(lines)


def _rank(report: RankReport, rehearsal: Rehearsal) -> list[str]:
    rank, zero = report.rank, report.zero
    layers = sorted({parameter.layer for parameter in zero.parameters if parameter.layer is not None})
    stages = ", ".join(map(str, report.stages))
    lines = [
        f"stage {stages} (rank {rank.layout.rank} stands for all): layers {layers[0]}-{layers[-1]}, "
        f"{rank.numel:,} parameters per tensor rank; ZeRO-3 shard {zero.shard_numel:,} x {zero.data_size} ranks = "
        f"{rank.numel:,} + {zero.padding:,} of padding"
    ]
    kinds = [kind for kind in KINDS if any(memory[kind] for memory in report.memory.values())]
    width = {kind: max(len(kind), 6) + 2 for kind in kinds}
    lines.append(f"{'peak GiB in':<12}" + "".join(f"{kind:>{width[kind]}}" for kind in kinds) + f"{'sum':>8}")
    for name, memory in report.memory.items():
        cells = "".join(f"{memory[kind] / GIB:>{width[kind]}.2f}" for kind in kinds)
        lines.append(f"{name:<12}{cells}{sum(memory.values()) / GIB:>8.2f}")
    lines.append("GB sent in one RL step (whole buffers)")
    for name, sent in report.sent.items():
        cells = [
            f"{group} {kind} {size / 1e9:,.2f}"
            for (group, kind), size in sorted(sent.items())
            if size > 5e6 and kind != "receive"
        ]
        if cells:
            lines.append(f"{name:<12}" + "; ".join(cells))
    if report.update_share:
        lines.append(
            f"an optimizer step sends {report.update_share:.2f} times one gather and one reduce-scatter of the stage"
        )
    return lines


def _job(rehearsal: Rehearsal) -> list[str]:
    hardware, plan = rehearsal.hardware, rehearsal.plan
    layout = plan.layout
    report = max(rehearsal.ranks, key=lambda rank: rank.peak[1])
    phase, size = report.peak
    verdict = "fits" if rehearsal.fits else "DOES NOT FIT"
    flops = (
        sum(
            (p.seen.flops + p.seen.wide_flops) * p.count / p.simulated * len(r.stages)
            for r in rehearsal.ranks
            for p in r.rank.phases.values()
        )
        * layout.tensor_size
        * layout.data_size
    )
    lines = [
        "estimated seconds of one RL step: "
        + ", ".join(f"{name} {seconds:,.1f}" for name, seconds in rehearsal.seconds.items() if seconds >= 0.05),
        f"{rehearsal.step_seconds:,.0f} s per step; {flops:.2e} FLOPs on all ranks, "
        f"{flops / rehearsal.step_seconds / layout.world_size / 1e12:,.0f} TFLOP/s per GPU; "
        f"{rehearsal.prompts_per_day:,.0f} prompts per day ({plan.work.group_size} responses each)",
        f"checkpoint: {rehearsal.checkpoint_bytes / 1e9:,.0f} GB, "
        f"{max(r.seconds['checkpoint'] for r in rehearsal.ranks):,.0f} s",
        f"peak: {size / GIB:.1f} GiB in {phase} on stage {report.stages[0]} of {hardware.gpu_memory_gib:g} GiB, "
        f"of which {hardware.reserved_gib:g} are reserved: {verdict}",
    ]
    if plan.teacher is not None:
        lines.append(
            "of the teacher are counted: shards, head, gathered stage, and the products with its parameters; "
            "not: its activations and logits, and what is sent to it"
        )
    host: Counter = Counter()
    for rank in rehearsal.ranks:
        parallel, zero = plan.parallel, rank.zero
        models = 1 + plan.holds_reference
        host[rank.stages[0]] = (
            zero.shard_numel * zero.itemsize * models * parallel.offload_parameters
            + 16 * zero.trained_numel * parallel.offload_optimizer
        )
    if any(host.values()):
        lines.append(f"in the host's memory: {max(host.values()) / GIB:.1f} GiB per rank")
    return lines


def _row(rehearsal: Rehearsal) -> str:
    layout, parallel = rehearsal.plan.layout, rehearsal.plan.parallel
    extras = [
        name
        for name in ("sequence_parallel", "recompute_activations", "offload_optimizer", "offload_parameters")
        if getattr(parallel, name)
    ] + (["gather=layer"] if parallel.gather == "layer" else [])
    phase, size = max((report.peak for report in rehearsal.ranks), key=lambda peak: peak[1])
    return (
        f"| {rehearsal.total_parameters / 1e9:.1f} B | {layout.world_size} | {layout.tensor_size} x "
        f"{layout.pipeline_size} x {layout.data_size} | {', '.join(extras) or '-'} | {size / GIB:.1f} ({phase}) | "
        f"{'yes' if rehearsal.fits else 'no'} | {rehearsal.seconds.get('generation', 0.0):,.0f} | "
        f"{rehearsal.seconds['update']:,.0f} | {rehearsal.step_seconds:,.0f} | {rehearsal.prompts_per_day:,.0f} | "
        f"{rehearsal.checkpoint_bytes / 1e9:,.0f} |"
    )

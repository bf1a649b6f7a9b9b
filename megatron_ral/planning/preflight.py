"""Preflight: a check that all ranks of a launch can start it, before any memory is taken.

Every rank reports its own state to the first rank, which compares all reports and prints every issue at once:

    1. each rank writes a small file into train.output_dir, and reports versions, GPUs, settings, shards and model files
    2. each rank looks for the file of another rank and reads its clock, and one process per node connects to all nodes
    3. the first rank judges; all ranks learn the verdict and end, or start

Neither a device nor a process group is needed.
"""

import os
import secrets
import shutil
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

from megatron_ral.errors import AgreedError
from megatron_ral.models.shape import ModelShape
from megatron_ral.planning import launch_facts
from megatron_ral.planning.disk import disk_problem
from megatron_ral.planning.launch_facts import LaunchSettings
from megatron_ral.planning.launch_issues import LaunchIssue, describe_issues
from megatron_ral.runtime.rendezvous import Rendezvous, RendezvousError

CLOCK_SKEW_SECONDS = 5.0
"""Largest difference of clocks that is accepted."""
_NO_PORT = ("", 0)


@dataclass
class Report:
    """State of one rank."""

    host: str
    """Name of the host."""
    node: str
    """Host and number of the launcher's agent on it."""
    issues: list[dict] = field(default_factory=list)
    """Issues that the rank found by itself, as fields of `LaunchIssue`."""
    facts: dict[str, str] = field(default_factory=dict)
    """Facts that must be the same on every rank."""
    settings: dict[str, str] = field(default_factory=dict)
    """Resolved settings by dotted key, which must be the same on every rank."""
    wrote: bool = False
    """True if the rank could write into the output folder."""
    port: Sequence[Any] = _NO_PORT
    """Address and port at which this node's first process listens; empty on the other processes."""


@dataclass(frozen=True)
class Observation:
    """View that one rank has of the other ranks."""

    clock: float
    """Time of its clock in seconds."""
    sees: bool
    """True if the file of the chosen writer appears in its output folder."""
    unreachable: list[list[Any]]
    """Ports of other nodes that it cannot reach: (node, address, port, error)."""


def check_launch(
    settings: Optional[LaunchSettings],
    shape: Optional[ModelShape],
    teacher: Optional[ModelShape] = None,
    problems: Sequence[Exception] = (),
    options: Optional[Mapping[str, Any]] = None,
    say: Callable[[str], None] = print,
) -> str:
    """Compare all ranks of the job, whose number is in the environment of torchrun.

    Every rank calls it, also one that cannot start.

    Args:
        settings: settings of the run; None where this rank could not read them.
        shape, teacher: models that this rank could read.
        problems: errors that this rank found before.
        options: further settings that must be the same everywhere, by name.
        say: function that prints the issues on the first rank. It is called while all other ranks still wait, because
            the launcher ends a job with the first rank that ends.

    Returns:
        One line about the comparison, on every rank.

    Raises:
        AgreedError: an issue was found; raised on every rank with the same text.
        RendezvousError: some ranks did not take part.
    """
    try:
        rendezvous = Rendezvous(settings.timeout_seconds if settings else 1800.0)
        return _check(rendezvous, settings, shape, teacher, problems, options or {}, say)
    except RendezvousError as error:
        say(f"rank {os.environ.get('RANK', 0)}: {error}")
        raise


def _check(
    rendezvous: Rendezvous,
    settings: Optional[LaunchSettings],
    shape: Optional[ModelShape],
    teacher: Optional[ModelShape],
    problems: Sequence[Exception],
    options: Mapping[str, Any],
    say: Callable[[str], None],
) -> str:
    folder = Path(settings.disk.output_dir) if settings else None
    made = launch_facts.missing_parents(folder) if folder and rendezvous.rank == 0 else []
    name = rendezvous.announce("probe", f".preflight-{secrets.token_hex(4)}")
    probe = folder / f"{name}-{rendezvous.rank}" if folder else None
    report = Report(socket.gethostname(), f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', 0)}")
    server = None
    try:
        issues, server = _look(report, probe, settings, shape, teacher, problems, options, rendezvous.rank)
        report.issues = [asdict(issue) for issue in issues]
        first = rendezvous.gather("report", asdict(report))
        writers = [rank for rank, other in enumerate(first or []) if other["wrote"]]
        task = rendezvous.announce(
            "task",
            {
                "writer": writers[0] if writers else None,
                "ports": [(other["node"], *other["port"]) for other in first or [] if other["port"][1]],
            },
        )
        sent = time.time()
        rendezvous.announce("clock", sent)
        observation = Observation(
            time.time(),
            task["writer"] is None
            or not report.wrote
            or folder is None
            or launch_facts.appears(folder / f"{name}-{task['writer']}"),
            launch_facts.unreachable_ports(task["ports"]) if server is not None else [],
        )
        second = rendezvous.gather("second", asdict(observation))
        found: dict[LaunchIssue, list[int]] = {}
        reports = [Report(**other) for other in first or []]
        if second is not None:
            observations = [Observation(**other) for other in second]
            found = _judge(reports, observations, sent, time.time(), task["writer"])
        rendezvous.announce("looked")
        # Every rank has looked for the files. Each removes its own before any rank ends.
        if probe is not None:
            launch_facts.remove_file(probe)
        rendezvous.gather("removed", None)
        verdict = describe_issues(found, [other.host for other in reports]) if found else None
        if verdict and rendezvous.rank == 0:
            for path in made:
                launch_facts.remove_folder(path)
            say(verdict)
        verdict = rendezvous.announce("verdict", verdict)
        rendezvous.gather("heard", None)  # the first rank may host the store
    finally:
        if server is not None:  # at the verdict, all nodes have tried to reach it
            server.close()
        if probe is not None:
            launch_facts.remove_file(probe)
    if verdict:
        raise AgreedError("", None, verdict)
    agreed = "agree on versions, settings, shards, model files and train.output_dir"
    return f"preflight: {rendezvous.world_size} ranks {agreed}"


def _look(
    report: Report,
    probe: Optional[Path],
    settings: Optional[LaunchSettings],
    shape: Optional[ModelShape],
    teacher: Optional[ModelShape],
    problems: Sequence[Exception],
    options: Mapping[str, Any],
    rank: int,
) -> tuple[list[LaunchIssue], Optional[socket.socket]]:
    """Fill in this rank's report; returns its issues, and the socket at which this node listens."""
    issues = [LaunchIssue.of(problem) for problem in problems if not isinstance(problem, OSError)]
    if settings is None or probe is None:
        return issues, None
    server = None
    unwritable = launch_facts.write_probe(probe.parent, probe.name)
    report.wrote = unwritable is None
    if unwritable:
        issues.append(unwritable)
    else:  # an output folder that cannot be written to is reported above
        issues += [LaunchIssue.of(problem) for problem in problems if isinstance(problem, OSError)]
    report.settings = {**settings.resolved, **{key: str(value) for key, value in options.items()}}
    try:
        report.facts = launch_facts.launch_facts(settings)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            issues += launch_facts.weight_issues(settings.models, shape, teacher)
            server, report.port = launch_facts.listen()
        if rank == 0 and report.wrote and shape is not None:
            problem = disk_problem(settings.disk, shape, shutil.disk_usage(probe.parent).free)
            issues += [LaunchIssue.of(problem)] if problem else []
    except OSError as error:  # reported instead of raised, because the other ranks wait for this report
        reason = f"cannot be read ({error.strerror or error}); is it changed, or its disk lost, while the job starts?"
        issues.append(LaunchIssue("file", f"'{error.filename}'", reason))
    return issues, server


def _judge(
    reports: Sequence[Report],
    observations: Sequence[Observation],
    sent: float,
    received: float,
    writer: Optional[int],
) -> dict[LaunchIssue, list[int]]:
    """Return the ranks of every issue.

    Args:
        reports, observations: results of every rank.
        sent, received: times between which all ranks read their clocks. A clock is certainly wrong where its reading
            lies outside.
        writer: rank whose file the others looked for.
    """
    found: dict[LaunchIssue, list[int]] = {}
    several = len({report.host for report in reports}) > 1
    usual = reports[0] if reports[0].settings else next((report for report in reports if report.settings), reports[0])
    first = reports.index(usual)
    for rank, (report, seen) in enumerate(zip(reports, observations)):
        own = [LaunchIssue(**issue) for issue in report.issues]
        reported = [issue.key for issue in own if issue.key]
        own += _differences(report.settings, usual.settings, first, reported, _SAME_SETTINGS)
        own += _differences(report.facts, usual.facts, first, reported, _SAME_MACHINES)
        output = "train.output_dir"
        if not seen.sees and report.settings.get(output) == usual.settings.get(output):
            own.append(
                LaunchIssue(
                    output,
                    f"'{report.settings[output]}'",
                    f"is another folder than on rank {writer}, whose file does not appear there; give one on a disk "
                    "that all nodes share",
                )
            )
        if not sent - CLOCK_SKEW_SECONDS <= seen.clock <= received + CLOCK_SKEW_SECONDS:
            remedy = "away from that of rank 0; set the clocks of the nodes (ntp)"
            own.append(LaunchIssue("clock", f"{seen.clock - sent:+.0f} s", remedy))
        for node, address, port, error in seen.unreachable:
            remedy = (
                f"of node {node} cannot be reached ({error}); open all ports between the nodes, and let every host "
                "name resolve to its address in that network"
            )
            own.append(LaunchIssue("port", f"{address}:{port}", remedy))
        if several and report.port[1] and report.port[0].startswith("127."):
            remedy = (
                f"resolves to {report.port[0]}, where other nodes cannot reach it; correct /etc/hosts, or set "
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            )
            own.append(LaunchIssue("host name", report.host, remedy))
        for issue in own:
            found.setdefault(issue, []).append(rank)
    return found


_SAME_SETTINGS = "start every node with the same --config and the same settings"
_SAME_MACHINES = "make every node the same: one environment, one checkout, one shared disk"


def _differences(
    theirs: Mapping[str, str], usual: Mapping[str, str], first: int, reported: Sequence[str], remedy: str
) -> list[LaunchIssue]:
    """Return the values of a rank that are not those of rank `first`, except below keys with a reported issue."""
    if not theirs or not usual:
        return []
    return [
        LaunchIssue(
            key,
            theirs.get(key, "nothing"),
            f"is not that of rank {first}, {usual.get(key, 'nothing')}; {remedy}",
        )
        for key in sorted(usual.keys() | theirs.keys())
        if usual.get(key, "nothing") != theirs.get(key, "nothing") and not any(key.startswith(k) for k in reported)
    ]

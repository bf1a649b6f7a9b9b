"""Whether all ranks of a launch are fit to start it, before any memory is taken.

Every rank looks at what it has and sees and reports it to the first, which compares and prints all that is wrong at once:

    1. each rank writes a small file into train.output_dir, and reports versions, GPUs, settings, shards, model files
    2. each rank looks for the file of another, reads its clock, and one process per node connects to all other nodes
    3. the first rank judges; all learn the verdict and end, or go on

Nothing here needs a device or a process group.
"""

import hashlib
import importlib.metadata
import os
import re
import secrets
import shutil
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

import torch

from megatron_ral.config import RunConfig, flat_settings
from megatron_ral.data.shards import find_shards
from megatron_ral.errors import CheckpointError, DataError
from megatron_ral.models.folder import config_folder
from megatron_ral.weights.conversion import check_weights, open_weights
from megatron_ral.models.shape import ModelShape
from megatron_ral.runtime.rendezvous import Rendezvous, RendezvousError
from megatron_ral.planning.disk import disk_problem

PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers")
CLOCK_SKEW_SECONDS = 5.0
_EMPTY_PORT = ("", 0)


class PreflightError(RuntimeError):
    """What keeps a launch from starting: one sentence, or a table of several."""


@dataclass(frozen=True)
class LaunchIssue:
    """One thing that is wrong."""

    key: str
    """Setting or fact."""
    value: str
    remedy: str
    """What is wrong with it and the way out."""
    text: str = ""
    """The whole as the sentence that it came in, where it did."""

    @classmethod
    def of(cls, error: Exception) -> "LaunchIssue":
        """An error sentence of this project (`key = value ...`) in its parts."""
        text = " ".join(str(error).split())
        found = re.match(r"(?:rank \d+: )?'?([\w.-]+)'? = ('[^']*'|\[[^]]*\]|\S+?)[:;,]? (.*)", text)
        return cls(*found.groups(), text=text) if found else cls("", "", text, text)

    def sentence(self) -> str:
        return self.text or f"{self.key} = {self.value} {self.remedy}"


@dataclass
class Report:
    """What one rank has and sees."""

    host: str
    node: str
    """Host, and the number of the launcher's agent there."""
    findings: list[dict] = field(default_factory=list)
    """What it found by itself (fields of Finding)."""
    facts: dict[str, str] = field(default_factory=dict)
    """What must be the same on every rank."""
    settings: dict[str, str] = field(default_factory=dict)
    """Resolved settings by dotted key, the same on every rank."""
    wrote: bool = False
    port: Sequence[Any] = _EMPTY_PORT
    """Address and port at which this node's first process listens; empty: another one's task."""


def check_launch(
    config: Optional[RunConfig],
    shape: Optional[ModelShape],
    teacher: Optional[ModelShape] = None,
    problems: Sequence[Exception] = (),
    options: Optional[Mapping[str, Any]] = None,
    say: Callable[[str], None] = print,
) -> str:
    """Compare all ranks of the job (environment of torchrun). Every rank calls it, also one that cannot go on.

    Args:
        config: resolved configuration; None: this rank has none.
        shape, teacher: of the models that this rank could read.
        problems: what this rank found wrong before.
        options: further settings that have to be the same everywhere, by name.
        say: gets what is wrong, on the first rank, while all others still wait: the launcher ends a job with its first rank
            that ends.

    Returns:
        One line that says what was compared, on every rank.

    Raises:
        PreflightError: on every rank, with the same text.
    """
    try:
        meeting = Rendezvous(60.0 * (config.parallel.timeout_minutes if config else 30))
        return _check(meeting, config, shape, teacher, problems, options or {}, say)
    except RendezvousError as error:
        say(f"rank {os.environ.get('RANK', 0)}: {error}")
        raise PreflightError(str(error)) from None


def _check(
    meeting: Rendezvous,
    config: Optional[RunConfig],
    shape: Optional[ModelShape],
    teacher: Optional[ModelShape],
    problems: Sequence[Exception],
    options: Mapping[str, Any],
    say: Callable[[str], None],
) -> str:
    folder = Path(config.train.output_dir) if config else None
    made = _missing_parents(folder) if folder and meeting.rank == 0 else []
    name = meeting.announce("probe", f".preflight-{secrets.token_hex(4)}")
    report = Report(socket.gethostname(), f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', 0)}")
    findings = [LaunchIssue.of(problem) for problem in problems if not isinstance(problem, OSError)]
    server = None
    try:
        if config is not None:
            unwritable = _write_probe(folder, f"{name}-{meeting.rank}")
            report.wrote = unwritable is None
            findings += (
                [unwritable]
                if unwritable
                else [LaunchIssue.of(error) for error in problems if isinstance(error, OSError)]
            )
            report.settings = {key: str(value) for key, value in {**flat_settings(config), **options}.items()}
            try:
                report.facts = _facts(config)
                if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                    findings += _weight_findings(config, shape, teacher)
                    server, report.port = _listen()
                if meeting.rank == 0 and report.wrote and shape is not None:
                    problem = disk_problem(config, shape, shutil.disk_usage(folder).free)
                    findings += [LaunchIssue.of(problem)] if problem else []
            except OSError as error:  # the others wait for this report
                findings.append(
                    LaunchIssue(
                        "file",
                        f"'{error.filename}'",
                        f"could not be looked at ({error.strerror or error}); is "
                        "it changed, or its disk lost, while the job starts?",
                    )
                )
        report.findings = [asdict(finding) for finding in findings]
        first = meeting.gather("report", asdict(report))
        writers = [rank for rank, other in enumerate(first or []) if other["wrote"]]
        task = meeting.announce(
            "task",
            {
                "writer": writers[0] if writers else None,
                "ports": [(other["node"], *other["port"]) for other in first or [] if other["port"][1]],
            },
        )
        sent = time.time()
        meeting.announce("clock", sent)
        second = meeting.gather(
            "second",
            {
                "clock": time.time(),
                "sees": task["writer"] is None or not report.wrote or _appears(folder / f"{name}-{task['writer']}"),
                "unreachable": _unreachable(task["ports"]) if server is not None else [],
            },
        )
        verdict = None
        if second is not None:
            verdict = _judge([Report(**other) for other in first], second, sent, time.time(), task["writer"])
        meeting.announce("looked")
        # everybody has looked; the file of each goes before anybody ends
        _remove(folder, f"{name}-{meeting.rank}")
        meeting.gather("removed", None)
        line = f"preflight: {meeting.world_size} ranks agree on versions, settings, shards, model files and train.output_dir"
        if verdict and meeting.rank == 0:
            for path in made:
                _remove(path.parent, path.name, is_folder=True)
            say(verdict)
        verdict = meeting.announce("verdict", verdict)
        meeting.gather("heard", None)  # the first rank may hold the store
    finally:
        if server is not None:  # the verdict came when all nodes had tried to reach it
            server.close()
        if folder is not None:
            _remove(folder, f"{name}-{meeting.rank}")
    if verdict:
        raise PreflightError(verdict)
    return line


# ---- what a rank looks at -------------------------------------------------------------------------------------------


def _facts(config: RunConfig) -> dict[str, str]:
    facts = {package: importlib.metadata.version(package) for package in PACKAGES}
    facts["megatron_ral"] = source_digest(Path(__file__).parents[1])
    facts["GPUs"] = "none"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0)))
        facts["GPUs"] = f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / 2**30:.0f} GiB"
    patterns = {f"data.train.{number}.shards": source.shards for number, source in enumerate(config.data.train)}
    for key, pattern in {**patterns, "data.eval_shards": config.data.eval_shards}.items():
        try:
            facts[key] = _listing(Path(shard) for shard in find_shards(pattern, key)) if pattern else "none"
        except DataError:  # told already
            continue
    for key, path in _models(config).items():
        folders = {Path(path), config_folder(path)}
        facts[key] = _listing(
            file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file()
        )
    return facts


def _models(config: RunConfig) -> dict[str, str]:
    paths = {
        "model.path": config.model.path,
        "model.reference_path": config.model.reference_path,
        "teacher.path": config.teacher.path if config.distills else "",
    }
    return {key: path for key, path in paths.items() if path}


def source_digest(folder: Path) -> str:
    """Short digest of every Python file below a folder."""
    digest = hashlib.sha256()
    for path in sorted(
        path for path in folder.rglob("*.py") if path.is_file()
    ):  # an editor's lock may be a link to nothing
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _listing(files) -> str:
    sizes = sorted((path.name, path.stat().st_size) for path in files)
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:6]
    return f"{len(sizes)} files, {sum(size for _, size in sizes)} bytes, names and sizes {digest}"


def _weight_findings(
    config: RunConfig, shape: Optional[ModelShape], teacher: Optional[ModelShape]
) -> list[LaunchIssue]:
    """Headers of the checkpoints against their config.json."""
    findings = []
    for key, path in _models(config).items():
        expected = teacher if key == "teacher.path" else shape
        try:
            if expected is not None:
                check_weights(open_weights(path), expected)
        except CheckpointError as error:
            lines = str(error).splitlines()
            text = "; ".join(" ".join(line.split()) for line in lines[:4]) + f"; and {len(lines) - 4} more" * (
                len(lines) > 4
            )
            findings.append(LaunchIssue(key, f"'{path}'", f"{text}; complete the folder or name another"))
    return findings


def _missing_parents(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist yet, innermost first."""
    return [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]


def _write_probe(folder: Path, name: str) -> Optional[LaunchIssue]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(socket.gethostname())
    except OSError as error:
        return LaunchIssue(
            "train.output_dir",
            f"'{folder}'",
            f"cannot be written to ({error.strerror}); give a folder on a "
            "disk that all nodes share and this user may write to",
        )
    return None


def _remove(folder: Path, name: str, is_folder: bool = False) -> None:
    try:
        (folder / name).rmdir() if is_folder else (folder / name).unlink(missing_ok=True)
    except OSError:
        pass


def _appears(path: Path, seconds: float = 10.0) -> bool:
    """Network file systems may show a new file late."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        try:
            os.listdir(path.parent)
            time.sleep(0.1)
        except OSError:
            return False
    return True


def _listen() -> tuple[socket.socket, tuple[str, int]]:
    """A socket on a port of the system's choice, as the groups and the watchdog will have them, and its address."""
    server = socket.create_server(("", 0), backlog=1024)
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    return server, (address, server.getsockname()[1])


def _unreachable(ports: Sequence[Sequence[Any]]) -> list[list[Any]]:
    failed = []
    for node, address, port in ports:
        try:
            socket.create_connection((address, port), timeout=10.0).close()
        except OSError as error:
            failed.append([node, address, port, str(error)])
    return failed


# ---- what the first rank concludes ----------------------------------------------------------------------------------


def _judge(
    reports: Sequence[Report], second: Sequence[Mapping[str, Any]], sent: float, received: float, writer: Optional[int]
) -> Optional[str]:
    """Text of everything that is wrong, or None.

    A clock is wrong for certain where its reading lies outside the time in which it was taken.
    """
    found: dict[LaunchIssue, list[int]] = {}

    def add(rank: int, *parts: str) -> None:
        found.setdefault(LaunchIssue(*parts), []).append(rank)

    several = len({report.host for report in reports}) > 1
    usual = reports[0] if reports[0].settings else next((report for report in reports if report.settings), reports[0])
    first = reports.index(usual)
    for rank, (report, late) in enumerate(zip(reports, second)):
        for finding in report.findings:
            add(rank, *(finding[name] for name in ("key", "value", "remedy", "text")))
        for what, remedy in (
            ("settings", "start every node with the same --config and the same settings"),
            ("facts", "make every node the same: one environment, one checkout, one shared disk"),
        ):
            ours, theirs = getattr(usual, what), getattr(report, what)
            told = {finding["key"] for finding in report.findings}
            for key in sorted(ours.keys() | theirs.keys()) if theirs and ours else ():
                if ours.get(key, "nothing") != theirs.get(key, "nothing") and not any(
                    key.startswith(t) for t in told if t
                ):
                    add(
                        rank,
                        key,
                        theirs.get(key, "nothing"),
                        f"is not that of rank {first}, {ours.get(key, 'nothing')}; {remedy}",
                    )
        output = "train.output_dir"
        if not late["sees"] and report.settings.get(output) == usual.settings.get(output):
            add(
                rank,
                output,
                f"'{report.settings[output]}'",
                f"is another folder than on rank {writer}, whose file does not "
                "appear there; give one on a disk that all nodes share",
            )
        if not sent - CLOCK_SKEW_SECONDS <= late["clock"] <= received + CLOCK_SKEW_SECONDS:
            add(
                rank,
                "clock",
                f"{late['clock'] - sent:+.0f} s",
                "away from that of rank 0; set the clocks of the nodes (ntp)",
            )
        for node, address, port, error in late["unreachable"]:
            add(
                rank,
                "port",
                f"{address}:{port}",
                f"of node {node} cannot be reached ({error}); open all ports between the "
                "nodes, and let every host name resolve to its address in that network",
            )
        if several and report.port[1] and report.port[0].startswith("127."):
            add(
                rank,
                "host name",
                report.host,
                f"resolves to {report.port[0]}, where other nodes cannot reach it; correct "
                "/etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
            )
    if not found:
        return None
    if len(found) == 1:
        [(finding, ranks)] = found.items()
        where = "" if len(ranks) == len(reports) else f"{_where(ranks, reports)}: "
        return where + finding.sentence()
    rows = [("where", "key", "value", "what is wrong, and the way out")]
    rows += [(_where(ranks, reports), finding.key, finding.value, finding.remedy) for finding, ranks in found.items()]
    widths = [min(max(len(row[column]) for row in rows), 48) for column in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows]
    return "\n".join([f"{len(found)} things are wrong; nothing was started", *lines])


def _where(ranks: Sequence[int], reports: Sequence[Report]) -> str:
    if len(ranks) == len(reports):
        return "all ranks"
    hosts = list(dict.fromkeys(reports[rank].host for rank in ranks))
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    numbers = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} ({', '.join(hosts[:4])}{', ...' if len(hosts) > 4 else ''})"

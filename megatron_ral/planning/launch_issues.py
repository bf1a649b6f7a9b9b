"""Issues that keep a launch from starting, and their table."""

from dataclasses import dataclass
from typing import Mapping, Sequence

from megatron_ral.errors import UserError, show_value


@dataclass(frozen=True)
class LaunchIssue:
    """One issue."""

    key: str
    """Setting or fact at fault; empty where only a sentence is known."""
    value: str
    """Value found there, as text."""
    remedy: str
    """Rest of the sentence: what is wrong, and the way out."""

    @classmethod
    def of(cls, error: Exception) -> "LaunchIssue":
        """Return an error in its parts, on one line."""
        if not isinstance(error, UserError):
            return cls("", "", _one_line(error))
        value = "" if error.value is None else _one_line(show_value(error.value))
        return cls(_one_line(error.key), value, _one_line(error.remedy))

    def sentence(self) -> str:
        """Return the issue as one sentence."""
        if not self.key:
            return self.remedy
        subject = f"{self.key} = {self.value}" if self.value else self.key
        return f"{subject}{'' if self.remedy[:1] in ':,;' else ' '}{self.remedy}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return ranks with their hosts, e.g. "ranks 0-3, 5 (node1, node2)", or "all ranks".

    Args:
        ranks: ranks in ascending order.
        hosts: host of every rank of the job.
    """
    if len(ranks) == len(hosts):
        return "all ranks"
    theirs = list(dict.fromkeys(hosts[rank] for rank in ranks))
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    numbers = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    more = ", ..." if len(theirs) > 4 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} ({', '.join(theirs[:4])}{more})"


def describe_issues(found: Mapping[LaunchIssue, Sequence[int]], hosts: Sequence[str]) -> str:
    """Return one issue as a sentence, or several as a table.

    Args:
        found: ranks of each issue, at least one issue.
        hosts: host of every rank of the job.
    """
    if len(found) == 1:
        [(issue, ranks)] = found.items()
        where = "" if len(ranks) == len(hosts) else f"{name_ranks(ranks, hosts)}: "
        return where + issue.sentence()
    rows = [("where", "key", "value", "what is wrong, and the way out")]
    rows += [
        (name_ranks(ranks, hosts), issue.key, issue.value, issue.remedy.lstrip(":,; "))
        for issue, ranks in found.items()
    ]
    widths = [min(max(len(row[column]) for row in rows), 48) for column in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows]
    return "\n".join([f"{len(found)} things are wrong; nothing was started", *lines])

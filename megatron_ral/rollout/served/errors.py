"""Failures of a sampler's server, as its client sees them."""

from dataclasses import dataclass


class ServerLost(Exception):
    """The server has ended, or was ended because it did not answer. The text says how."""


class RequestTimeout(Exception):
    """A request took too long and was given up. The server goes on."""


class RequestRefused(Exception):
    """The server does not serve a request. The text says why."""


@dataclass(frozen=True)
class Failure:
    """Failure of the server, as all ranks of a copy know it."""

    reason: str
    is_lost: bool
    """True if the server has ended, so that the next one needs all weights."""
    is_final: bool
    """True if the server will not serve the same request another time either."""

    @classmethod
    def of(cls, error: RequestTimeout | ServerLost | RequestRefused) -> "Failure":
        """Return the failure that an error of the client tells of."""
        is_final = isinstance(error, RequestRefused)
        start = {RequestTimeout: "the sampler's server ", RequestRefused: "the sampler's server refused a request: "}
        return cls(f"{start.get(type(error), '')}{error}", isinstance(error, ServerLost), is_final)

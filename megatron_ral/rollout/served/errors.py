"""Failures of a sampler's server, as its client sees them."""


class ServerLost(Exception):
    """The server has ended, or was ended because it did not answer. The text says how."""


class RequestTimeout(Exception):
    """A request took too long and was given up. The server goes on."""


class RequestRefused(Exception):
    """The server does not serve a request. The text says why."""

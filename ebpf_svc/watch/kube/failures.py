"""Why the API server did not answer as hoped; all of it is tried again."""

from __future__ import annotations

from ebpf_svc.errors import WatchError


class Unreachable(WatchError):
    """Nobody answers, or the connection broke off."""


class Broken(Unreachable):
    """The server answered, and then the connection broke or carried nonsense."""


class Silent(Unreachable):
    """Nothing was said for so long that the connection may be dead; or nothing happens."""


class Expired(WatchError):
    """The resource version is too old (410): what happened since is lost, so list again."""


class Refused(WatchError):
    """The API server answered with an error.

    Args:
        status: the HTTP status.
        message: what it says.
        retry_after_s: when it wants to be asked again; None = it does not say.
    """

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.retry_after_s = status, retry_after_s

    @property
    def is_outage(self) -> bool:
        """It is the server that fails, whatever is asked."""
        return self.status >= 500

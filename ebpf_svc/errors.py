"""The exception tree: one class per kind of failure, carrying values rather than sentences.

    EbpfSvcError
    ├── ConfigError            a setting or flag is wrong
    ├── InvalidObject          a manifest or API object is wrong: reported, skipped, all else goes
    on
    ├── UnsupportedHost        this machine cannot run what was asked
    ├── WatchError             the outside world cannot be read just now: retried
    └── DataplaneError
        ├── CompileError       the C does not compile here
        ├── VerifierError      the kernel refused a program
        ├── LayoutMismatch     C and Python disagree about a map
        ├── ApplyError         one frontend could not be written: retried
        └── CommandError       a program of the host failed

Three fates, chosen by class: bad input is reported and skipped; a transient failure is retried with
back-off; a broken invariant ends the process with a non-zero status and leaves forwarding in place.
"""

from __future__ import annotations

from collections.abc import Sequence


class EbpfSvcError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(EbpfSvcError):
    """A setting is wrong: `path` names it, `got` and `expected` say how."""

    def __init__(self, path: str, *, got: object, expected: str) -> None:
        super().__init__(f"{path}: got {got!r}, expected {expected}")
        self.path, self.got, self.expected = path, got, expected


class InvalidObject(EbpfSvcError):
    """An object of the outside world is wrong; it is skipped and everything else goes on.

    Args:
        source: where it was read, e.g. a file name; empty for the API server.
        object_ref: `Kind namespace/name`.
        field: JSON path of the field, e.g. `spec.ports[1].name`.
        message: what an API server would have said.
    """

    def __init__(self, source: str, object_ref: str, field: str, message: str) -> None:
        super().__init__(": ".join(part for part in (source, object_ref, field, message) if part))
        self.source, self.object_ref, self.field, self.message = source, object_ref, field, message


class UnsupportedHost(EbpfSvcError):
    """This machine lacks something; each of `missing` is a sentence that says how to mend it."""

    def __init__(self, missing: Sequence[str]) -> None:
        super().__init__("; ".join(missing))
        self.missing = tuple(missing)


class WatchError(EbpfSvcError):
    """The source of objects cannot be read just now; the last state stays in force."""


class DataplaneError(EbpfSvcError):
    """Base of what goes wrong between a plan and the kernel."""


class CompileError(DataplaneError):
    """The C source does not compile on this node."""

    def __init__(self, unit: str, log: str) -> None:
        super().__init__(f"{unit} does not compile:\n{log}")
        self.unit, self.log = unit, log


class VerifierError(DataplaneError):
    """The kernel refused a program; `log_tail` is the end of the verifier's log."""

    def __init__(self, program: str, errno_name: str, log_tail: str) -> None:
        super().__init__(f"the kernel refused program {program} ({errno_name}):\n{log_tail}")
        self.program, self.errno_name, self.log_tail = program, errno_name, log_tail


class LayoutMismatch(DataplaneError):
    """A pinned or compiled map does not have the layout Python writes."""

    def __init__(self, table: str, *, kernel: object, python: object) -> None:
        super().__init__(f"map {table}: the kernel has {kernel}, this version writes {python}")
        self.table, self.kernel, self.python = table, kernel, python


class ApplyError(DataplaneError):
    """Part of a plan could not be written; `service` names it and `__cause__` says why."""

    def __init__(self, service: str, reason: str) -> None:
        super().__init__(f"{service}: {reason}")
        self.service, self.reason = service, reason


class CommandError(DataplaneError):
    """A program of the host failed."""

    def __init__(self, argv: Sequence[str], code: int, stderr: str) -> None:
        super().__init__(f"{' '.join(argv)} exited with {code}: {stderr.strip()}")
        self.argv, self.code, self.stderr = tuple(argv), code, stderr

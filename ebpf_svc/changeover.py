"""One dataplane after another, under traffic: the new one serves before the old one lets go.

`Serving` stands where the sync loop and whoever looks expect one dataplane. `Changeover` owns the
others: the one that is being filled, and those that serve no more and keep their connections until
they end. The kernel may hold two dataplanes meanwhile; each connection meets one of them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

from ebpf_svc.choice import Choice, Site, candidates, close_quietly
from ebpf_svc.config import Settings
from ebpf_svc.control import Progress, Step, Tell
from ebpf_svc.dataplane.base import ApplyReport, Dataplane
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import DesiredState

TICK_S = 1.0
"""How often a dataplane that retires is asked whether it may go."""
HANDOVER_S = 60.0
"""How long the loop may be busy with the old dataplane before a switch is given up."""
AGAIN_S = 30.0
"""When a cleanup that failed is tried again."""
FAILURES_TOLD = 3
PATIENCE = 3
"""How often a dataplane may fail to let go: until it does, new connections meet what it last knew,
which is worse than to cut those that are open."""

log = get_logger(__name__)


class Serving:
    """The dataplane that serves now; the sync loop applies to it."""

    def __init__(self, on_change: Callable[[Choice], None] = lambda choice: None) -> None:
        """Nothing serves yet.

        Args:
            on_change: called when another serves, before the one before is touched; by the loop's
                thread, once it runs.
        """
        self._on_change = on_change
        self._lock = threading.Lock()
        self._choice: Choice | None = None
        self._successor: tuple[Choice, Future[Dataplane]] | None = None
        self.desired: DesiredState | None = None
        """What was applied last."""

    @property
    def name(self) -> str:
        """The mode that serves; empty before the first."""
        return self._choice.dataplane.name if self._choice else ""

    @property
    def refused(self) -> Mapping[str, str]:
        """Modes that were preferred and cannot run here, with why."""
        return self._choice.refused if self._choice else {}

    @property
    def dataplane(self) -> Dataplane:
        """The one that serves."""
        if self._choice is None:
            raise DataplaneError("no dataplane is open yet")
        return self._choice.dataplane

    def begin(self, choice: Choice) -> None:
        """Let the first one serve; it is open."""
        self._choice = choice
        self._on_change(choice)

    def close(self) -> None:
        """Close the one that serves."""
        if self._choice is not None:
            self._choice.dataplane.close()

    def succeed(self, choice: Choice) -> Future[Dataplane]:
        """Let the next apply go to another dataplane, which then serves.

        Returns:
            the one before, once it serves no more; a DataplaneError when the other could not be
            told everything, and all is as it was.
        """
        done: Future[Dataplane] = Future()
        with self._lock:
            self._successor = choice, done
        return done

    def withdraw(self) -> None:
        """Take back `succeed` unless it is done."""
        with self._lock:
            if self._successor is not None:
                self._successor[1].set_exception(DataplaneError("given up"))
                self._successor = None

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """Apply to the one that is to serve; else, as `Dataplane.apply`, to the one that does."""
        with self._lock:
            report = self._hand_over(desired)
        if report is None:
            report = self.dataplane.apply(desired, resync=resync)
        self.desired = desired
        return report

    def _hand_over(self, desired: DesiredState) -> ApplyReport | None:
        """Tell the successor, and let it serve; None = there is none, or it failed."""
        if self._successor is None:
            return None
        (choice, done), self._successor = self._successor, None
        try:
            report = choice.dataplane.apply(desired)
            _refuse_failures(report)
        except (DataplaneError, OSError) as error:
            done.set_exception(error)
            return None
        before, self._choice = self.dataplane, choice
        self._on_change(choice)
        done.set_result(before)
        return report


@dataclass(slots=True)
class _Retiring:
    """A dataplane that serves no more."""

    dataplane: Dataplane
    since_s: float
    deadline_s: float
    tell: Tell = field(default=lambda progress: None)
    failures: int = 0
    """How often in a row it could not even be asked."""


class Changeover:
    """Switches between dataplanes, in a thread of its own."""

    def __init__(
        self,
        site: Site,
        serving: Serving,
        *,
        wake: Callable[[], None],
        tick_s: float = TICK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind the parts; nothing runs yet.

        Args:
            site: makes and opens dataplanes; its settings say how long connections may go on.
            serving: where the sync loop applies.
            wake: makes the loop apply soon, and read back what the kernel holds.
            tick_s: pause between two questions to one that retires.
            clock: seconds that only grow.
        """
        self._site, self._serving, self._wake = site, serving, wake
        self._tick_s, self._clock = tick_s, clock
        self._asked = site.settings.mode, site.settings.fallback
        self._drain_s = site.settings.drain_s
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._retiring: dict[str, _Retiring] = {}
        self._thread = threading.Thread(target=self._run, name="changeover", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End; what retires stays in the kernel, and the next start goes on with it."""
        self._jobs.put(None)
        self._serving.withdraw()
        if self._thread.is_alive():
            self._thread.join()
        for each in self._retiring.values():
            close_quietly(each.dataplane)

    def take(self, settings: Settings) -> None:
        """Go by these settings from now on; another mode is a switch."""
        self._drain_s = settings.drain_s
        asked = settings.mode, settings.fallback
        if asked != self._asked:
            self._asked = asked
            self.switch(candidates(settings))

    def switch(
        self,
        modes: Sequence[str],
        *,
        drain_s: float | None = None,
        tell: Tell = lambda progress: None,
    ) -> None:
        """Let the first of these modes that can run serve; returns at once.

        Args:
            modes: in order of preference; the one that serves is as good as any that can run.
            drain_s: how long open connections keep the old one; None = as the settings say.
            tell: told of each step, by another thread.
        """
        self._jobs.put(lambda: self._switch(modes, drain_s, tell))

    def clean_leftovers(self) -> None:
        """Retire what other modes of ours left in this kernel; to be called once we serve (Z3)."""
        self._jobs.put(self._take_leftovers)

    def _run(self) -> None:
        while True:
            self._look_after_all()
            pause_s = self._tick_s if self._retiring else None
            try:
                job = self._jobs.get(timeout=pause_s)
            except queue.Empty:
                continue
            if job is None:
                return
            job()

    # -- the new one -------------------------------------------------------------------------------

    def _switch(self, modes: Sequence[str], drain_s: float | None, tell: Tell) -> None:
        refused: dict[str, str] = {}
        for mode in modes:
            if mode == self._serving.name:
                tell(Progress(Step.DONE, mode, "serves already"))
                return
            try:
                before = self._change_to(mode, refused, tell)
            except (UnsupportedHost, DataplaneError, OSError) as error:
                refused[mode] = str(error)
                log.error("mode.refused", mode=mode, reason=str(error))
                continue
            log.info("mode.switched", mode=mode)
            tell(Progress(Step.SERVING, mode))
            self._retire(before, self._drain_s if drain_s is None else drain_s, tell)
            return
        reasons = "; ".join(f"mode {mode}: {reason}" for mode, reason in refused.items())
        tell(Progress(Step.FAILED, "", f"{reasons}. {self._serving.name} goes on as it was"))

    def _change_to(self, mode: str, refused: Mapping[str, str], tell: Tell) -> Dataplane:
        """Open, fill, hand over; returns the one before. What fails leaves nothing of the new."""
        retiring = self._retiring.pop(mode, None)
        if retiring is not None:
            close_quietly(retiring.dataplane)
            retiring.tell(Progress(Step.DONE, mode, "is to serve again"))
        dataplane = self._site.make(mode)
        try:
            tell(Progress(Step.OPENING, mode))
            self._site.open(dataplane)
            tell(Progress(Step.FILLING, mode))
            self._fill(dataplane)
            done = self._serving.succeed(Choice(dataplane, dict(refused)))
            self._wake()
            try:
                return done.result(HANDOVER_S)
            except FutureTimeout:
                self._serving.withdraw()
                return done.result()
        except (UnsupportedHost, DataplaneError, OSError):
            self._undo(dataplane, retiring)
            raise

    def _fill(self, dataplane: Dataplane) -> None:
        """Write all that is served, while the other one goes on; the handover tells the rest."""
        desired = self._serving.desired
        if desired is None:
            raise DataplaneError("nothing is served yet: the agent has not synced")
        dataplane.apply(desired)

    def _undo(self, dataplane: Dataplane, retiring: _Retiring | None) -> None:
        close_quietly(dataplane)
        if retiring is not None:  # connections may still need it
            self._retiring[dataplane.name] = retiring
            return
        try:
            dataplane.cleanup()
        except (DataplaneError, OSError) as error:
            log.warning("mode.left", mode=dataplane.name, error=str(error))
        # Modes share names with each other: what serves looks whether all of its is there.
        self._wake()

    # -- the old ones ------------------------------------------------------------------------------

    def _take_leftovers(self) -> None:
        for dataplane in self._site.leftovers([self._serving.name, *self._retiring]):
            log.info("mode.leftover", mode=dataplane.name)
            self._retire(dataplane, self._drain_s, lambda progress: None)

    def _retire(self, dataplane: Dataplane, drain_s: float, tell: Tell) -> None:
        now_s = self._clock()
        self._retiring[dataplane.name] = _Retiring(dataplane, now_s, now_s + drain_s, tell)

    def _look_after_all(self) -> None:
        for mode, each in list(self._retiring.items()):
            if self._may_go(each) and self._remove(each):
                del self._retiring[mode]

    def _may_go(self, each: _Retiring) -> bool:
        """Ask a dataplane whether it is done, and tell how long that takes."""
        mode, now_s = each.dataplane.name, self._clock()
        detail = f"{now_s - each.since_s:.0f} s of at most {each.deadline_s - each.since_s:.0f} s"
        try:
            if each.dataplane.retire():
                return True
            each.failures = 0
        except (UnsupportedHost, DataplaneError, OSError) as error:
            each.failures += 1
            detail += f": {error}"
            log.warning("mode.not-retired", mode=mode, error=str(error), count=each.failures)
            if each.failures >= PATIENCE:
                return True
        if now_s >= each.deadline_s:
            log.warning("mode.not-drained", mode=mode, reason=detail)
            return True
        each.tell(Progress(Step.DRAINING, mode, detail))
        return False

    def _remove(self, each: _Retiring) -> bool:
        mode = each.dataplane.name
        try:
            each.dataplane.cleanup()
        except (DataplaneError, OSError) as error:
            log.warning("mode.left", mode=mode, error=str(error), retry_s=AGAIN_S)
            each.tell(Progress(Step.FAILED, mode, f"not all of it could be removed: {error}"))
            each.deadline_s, each.tell = self._clock() + AGAIN_S, lambda progress: None
            return False
        log.info("mode.removed", mode=mode)
        # Modes share names with each other: what serves looks whether all of its is there.
        self._wake()
        each.tell(Progress(Step.DONE, mode, "nothing of it is left"))
        return True


def _refuse_failures(report: ApplyReport) -> None:
    """Raise when not every service port could be written."""
    if report.failed:
        some = "; ".join(map(str, report.failed[:FAILURES_TOLD]))
        raise DataplaneError(f"{len(report.failed)} service ports cannot be served: {some}")

"""Attach loaded programs to this node's devices and cgroup, and keep them there.

A thread follows netlink: a new device gets its programs within milliseconds, a filter or qdisc
somebody deletes is put back at once. `verify` looks at everything anew for what netlink does not
tell. Works in the network namespace of the thread that calls `start` or `detach_all`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence

from ebpf_svc.config import EbpfSettings, SocketLB
from ebpf_svc.dataplane.ebpf import filters, hooks, xdp
from ebpf_svc.dataplane.ebpf.devices import DeviceRole, role_of
from ebpf_svc.dataplane.ebpf.filters import Outcome
from ebpf_svc.dataplane.ebpf.programs import SOCKET_PROGRAMS, LoadedProgram, Programs
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.host import links, netlink, rtnetlink
from ebpf_svc.host.links import Link
from ebpf_svc.host.netlink import Message
from ebpf_svc.log import get_logger

log = get_logger(__name__)

RETRY_S = 1.0
"""How soon a failed pass over the devices is tried again."""


class Attachments:
    """The programs of one agent on its devices and its cgroup.

    `_lock` covers everything below it: the thread and `verify`, `replace` share one netlink socket.
    """

    def __init__(
        self,
        programs: Programs,
        settings: EbpfSettings,
        *,
        hooks: Collection[str] = SOCKET_PROGRAMS,
    ) -> None:
        """Bind to loaded programs; nothing is attached yet.

        Args:
            hooks: C names of the socket programs to attach, where the settings want any.
        """
        self._settings, self._socket_hooks = settings, hooks
        self._lock = threading.Lock()
        self._programs = programs
        self._devices: dict[int, tuple[Link, DeviceRole]] = {}
        self._problems: dict[int, str] = {}
        self._repairs: list[str] = []
        self._netlink: rtnetlink.Socket | None = None
        self._notifications: rtnetlink.Notifications | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self) -> None:
        """Attach everywhere, then follow changes.

        Raises:
            UnsupportedHost: there is no cgroup2.
            DataplaneError: the cgroup takes no programs, or netlink does not answer.
        """
        self._stopping = False
        try:
            # Before the first look, so that nothing falls between it and the first message.
            self._notifications = rtnetlink.Notifications(
                [rtnetlink.GROUP_LINK, rtnetlink.GROUP_TC]
            )
            self._netlink = rtnetlink.Socket()
            with self._lock:
                self._scan()
                self._put_hooks()
        except OSError as error:
            self.stop()
            raise DataplaneError(f"netlink: {error}") from error
        except (DataplaneError, UnsupportedHost):
            self.stop()
            raise
        self._thread = threading.Thread(target=self._follow, name="attach", daemon=True)
        self._thread.start()

    @property
    def is_following(self) -> bool:
        """Between `start` and `stop`."""
        return self._thread is not None

    def stop(self) -> None:
        """Stop following; what is attached stays (Z2)."""
        self._stopping = True
        if self._thread is not None and self._notifications is not None:
            self._notifications.wake()
            self._thread.join()
            self._thread = None
        for opened in (self._notifications, self._netlink):
            if opened is not None:
                opened.close()
        self._notifications = self._netlink = None

    def replace(self, programs: Programs) -> None:
        """Swap every attached program for its successor, each in one step, under traffic.

        The caller keeps `programs` open from then on and may close the old ones.
        """
        with self._lock:
            self._programs = programs
            self._scan()
            self._put_hooks()

    def verify(self) -> list[str]:
        """Look at every device and the cgroup, put back what is missing.

        Returns:
            a sentence for each thing put back, those of the following thread since the last call
            included.
        """
        with self._lock:
            try:
                self._scan(repairing=True)
            except OSError as error:
                raise DataplaneError(f"netlink: {error}") from error
            self._repairs += self._put_hooks()
            repairs, self._repairs = self._repairs, []
        return repairs

    def devices(self) -> dict[str, DeviceRole]:
        """The devices that carry programs now, by name."""
        with self._lock:
            return {link.name: role for link, role in self._devices.values()}

    def problems(self) -> list[str]:
        """What cannot be attached, a sentence a device."""
        with self._lock:
            return sorted(self._problems.values())

    # Below: called with the lock held.

    def _scan(self, *, repairing: bool = False) -> None:
        assert self._netlink is not None
        found, others = {}, []
        for link in links.links(self._netlink):
            role = role_of(link, self._settings)
            if role is not None:
                found[link.index] = (link, role)
            else:
                others.append(link.index)
        known = self._devices
        if not known:  # an earlier run, with other settings, may have had others
            self._strip(others)
        self._drop(known.keys() - found.keys())
        self._devices = found
        self._put(list(found.values()), repaired=known.keys() if repairing else ())

    def _put(
        self, devices: Sequence[tuple[Link, DeviceRole]], *, repaired: Iterable[int] = ()
    ) -> None:
        """Bring devices up to date; on those in `repaired` every new filter is a repair."""
        assert self._netlink is not None
        outcome = filters.put(self._netlink, devices, self._programs)
        names = {link.index: link.name for link, _ in devices}
        broken = set(repaired)
        for item in outcome.attached:
            if item.index in broken:
                self._repairs.append(f"{names[item.index]}: filter {item.name} put back")
        nics = [link for link, role in devices if role is DeviceRole.NODE]
        for index, problem in xdp.put(self._netlink, nics, self._programs).items():
            outcome.problems.setdefault(index, problem)
        self._note_problems(outcome, names)
        changed = {item.index for item in outcome.attached}
        for index in changed:
            event = "attach.repaired" if index in broken else "attach.device"
            log.debug(event, device=names[index], ifindex=index)

    def _note_problems(self, outcome: Outcome, names: dict[int, str]) -> None:
        for index in names:
            if index not in outcome.problems:
                self._problems.pop(index, None)
        for index, reason in outcome.problems.items():
            if self._problems.get(index) != reason:
                self._problems[index] = reason
                log.warning("attach.problem", device=names[index], reason=reason)

    def _drop(self, indexes: Iterable[int]) -> None:
        """Forget devices, and take our filters off those that are still there."""
        assert self._netlink is not None
        gone = [index for index in indexes if self._devices.pop(index, None) is not None]
        for index in gone:
            self._problems.pop(index, None)
        if gone:
            self._strip(gone)

    def _strip(self, indexes: Collection[int]) -> None:
        """Take our programs off devices that are none of ours."""
        assert self._netlink is not None
        filters.remove(self._netlink, indexes)
        xdp.remove(self._netlink, indexes)

    def _put_hooks(self) -> list[str]:
        return hooks.put(hooks.cgroup_of(self._settings), self._socket_programs())

    def _socket_programs(self) -> list[LoadedProgram]:
        if self._settings.socket_lb is SocketLB.OFF:
            return []
        return [program for program in self._programs if program.name in self._socket_hooks]

    # The following thread.

    def _follow(self) -> None:
        assert self._notifications is not None
        rescan = False
        while not self._stopping:
            messages: list[Message] = []
            try:
                messages = self._notifications.wait(RETRY_S if rescan else None)
            except netlink.Overrun:
                rescan = True
            if self._stopping:
                return
            try:
                with self._lock:
                    if rescan:
                        self._scan(repairing=True)
                        rescan = False
                    self._handle(messages)
            except OSError as error:
                log.warning("attach.failed", error=str(error), retry_s=RETRY_S)
                rescan = True

    def _handle(self, messages: Iterable[Message]) -> None:
        fresh: dict[int, tuple[Link, DeviceRole]] = {}
        broken: dict[int, tuple[Link, DeviceRole]] = {}
        for message in messages:
            if message.type in (rtnetlink.NEWLINK, rtnetlink.DELLINK):
                link = links.parse_link(message)
                if link is None:
                    continue
                # A device of the same index in a message to come is another device.
                broken.pop(link.index, None)
                was_fresh = fresh.pop(link.index, None) is not None
                if message.type == rtnetlink.DELLINK:
                    self._devices.pop(link.index, None)
                    self._problems.pop(link.index, None)
                elif (role := role_of(link, self._settings)) is None:
                    self._drop([link.index])
                else:
                    old = self._devices.get(link.index)
                    self._devices[link.index] = (link, role)
                    if was_fresh or old is None or old[1] is not role:
                        fresh[link.index] = (link, role)
            elif message.type in (rtnetlink.DELTFILTER, rtnetlink.DELQDISC):
                index = links.index_of_tc(message)
                if index in self._devices and index not in fresh:
                    broken[index] = self._devices[index]
        if fresh:
            self._put(list(fresh.values()))
        if broken:
            self._put(list(broken.values()), repaired=broken)


def is_anything_attached() -> bool:
    """Whether a device of this network namespace carries a filter of ours, of any version."""
    netlink = rtnetlink.Socket()
    try:
        return filters.has_any(netlink)
    finally:
        netlink.close()


def detach_all(settings: EbpfSettings) -> int:
    """Take everything of ours off every device and the cgroup, whoever put it there.

    Returns:
        how many filters and hooks there were.
    """
    netlink = rtnetlink.Socket()
    try:
        count = filters.remove(netlink) + xdp.remove(netlink)
    except OSError as error:
        raise DataplaneError(f"netlink: {error}") from error
    finally:
        netlink.close()
    try:
        path = hooks.cgroup_of(settings)
    except UnsupportedHost:
        return count
    return count + hooks.remove(path)

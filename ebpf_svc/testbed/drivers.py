"""Make the testbed's wires fit for programs in drivers (XDP).

A veth takes what its peer's driver sends back only while its own driver runs a program; and what a
driver forwards is as it is on the wire, so nobody may leave a checksum to hardware there is none
of.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from contextlib import closing

from ebpf_svc.host import bpf_prog, links, rtnetlink
from ebpf_svc.host.bpf_prog import ProgramType
from ebpf_svc.testbed.host import Host

_XDP_PASS = 2
_PASS_ALL = struct.pack("<BBhi", 0xB7, 0, 0, _XDP_PASS) + struct.pack("<BBhi", 0x95, 0, 0, 0)
"""r0 = XDP_PASS; exit."""


def prepare(router: Host, hosts: Iterable[Host]) -> None:
    """Let the router take what NICs send back, and every host compute its own checksums."""
    for host in hosts:
        for device in json.loads(host.run(["ip", "-j", "link"])):
            if device["link_type"] == "ether":
                host.run(["ethtool", "-K", device["ifname"], "tx", "off"])
    program = bpf_prog.load(_PASS_ALL, program_type=ProgramType.XDP, name="testbed_pass")
    try:
        with router.namespace.entered(), closing(rtnetlink.Socket()) as netlink:
            for link in links.links(netlink):
                if link.kind == "veth":
                    failure = links.set_xdp(netlink, link.index, program)
                    if failure is not None:
                        raise OSError(failure.errno, failure.reason, link.name)
    finally:
        os.close(program)

"""From the API server to the dataplane, through the agent's own parts."""

from __future__ import annotations

import threading
from pathlib import Path

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import Settings
from ebpf_svc.dataplane.fake import FakeDataplane
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Protocol
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.sync import SyncLoop
from tests.lib import apiserver as api
from tests.lib.apiserver import watching
from tests.lib.waiting import eventually, wait_out

WEB = FrontendKey("10.96.0.10", 80, Protocol.TCP)


def test_traffic_follows_the_api_server_and_outlives_it(
    server: MockApiServer, tmp_path: Path
) -> None:
    """M4, R6, 7.15: nothing before the lists, then every event, no change while it is away."""
    dataplane, settings = FakeDataplane(), Settings(run_dir=tmp_path)
    dataplane.open()
    server.faults.append(MockApiServer.Fault("endpointslices", status=503, times=3))
    with watching(server) as seen:
        planner = Planner(PlanOptions.from_settings(settings))
        loop = SyncLoop(seen.store, planner, dataplane, settings)
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            eventually(lambda: WEB in dataplane.kernel)
            assert len(dataplane.kernel[WEB].backends) == 1, "the first write has the endpoints"
            server.put("EndpointSlice", api.endpoint_slice("shop/web-b", "10.244.3.1"))
            eventually(lambda: len(dataplane.kernel[WEB].backends) == 2)
            server.stop()
            before, writes = dict(dataplane.kernel), dataplane.writes
            wait_out(0.3)
            assert (dataplane.kernel, dataplane.writes) == (before, writes)
            server.delete("EndpointSlice", "shop", "web-a")
            server.start()
            eventually(lambda: len(dataplane.kernel[WEB].backends) == 1, within_s=1.0)
        finally:
            loop.close()
            thread.join(5)

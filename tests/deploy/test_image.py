"""The image, built from nothing but Debian's archive and wheels, and run as a pod."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest

from ebpf_svc import __version__
from tests.deploy.conftest import rendered
from tests.deploy.image import Image, Pod

TOOLS = ("buildah", "mmdebstrap", "unshare", "nsenter")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"apt-get install {' '.join(MISSING)}"),
]

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  clusterIP: 10.96.0.80
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.244.0.7], conditions: {ready: true}}]
ports: [{name: "", port: 8080, protocol: TCP}]
"""
CONNECT = """\
import socket
server = socket.create_server(("10.244.0.7", 8080))
client = socket.create_connection(("10.96.0.80", 80), timeout=10)
accepted, peer = server.accept()
print(client.getsockname() == peer, client.getpeername())
"""
"""A client of the Service that is its endpoint too."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Built once."""
    folder = tmp_path_factory.mktemp("image")
    built = Image(folder)
    try:
        built.build()
        yield built
    finally:
        built.remove()
        shutil.rmtree(folder)


def test_image_runs_the_agent_of_this_version(image):
    """The entrypoint answers without anything but its arguments."""
    configuration = image.configuration()

    said = image.run(*configuration["Entrypoint"], "--version")

    assert said == f"ebpf-svc, version {__version__}"
    assert configuration["Labels"]["org.opencontainers.image.version"] == __version__


def test_image_holds_no_tool_chain_besides_bcc(image):
    """Less to patch, and nothing for an intruder to build with."""
    found = image.run("sh", "-c", "command -v gcc cc clang ld as make pip pip3 || true")

    assert found == ""


def test_pod_serves_a_service_with_the_headers_of_the_image(image, tmp_path):
    """A node without headers compiles all the same; the root file system stays unwritten.

    Everything the DaemonSet mounts is where it says, and the cgroup takes programs read-only.
    """
    with Pod(image, rendered("base"), tmp_path) as pod:
        (pod.volume("tmp") / "web.yaml").write_text(SERVICE)
        pod.outside("ip", "addr", "add", "10.244.0.7/24", "dev", "lo")

        pod.start("run", "--config=/etc/ebpf-svc/config.yaml", "--manifests=/tmp")
        pod.wait_for("sync.applied")

        shown = json.loads(pod.execute(*pod.program, "show", "services", "--json"))
        assert [each["service"] for each in shown["services"]] == ["default/web"]
        said = pod.outside("/usr/bin/python3", "-c", CONNECT)
        assert said == "True ('10.96.0.80', 80)\n"
        headers = list(pod.volume("cache").glob("headers-*-image"))
        assert headers, "compiled with other headers than the image's"

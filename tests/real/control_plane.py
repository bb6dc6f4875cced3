"""A real kube-apiserver and its etcd on the loopback device of a node."""

from __future__ import annotations

import base64
import json
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebpf_svc.testbed.addressing import SERVICE_CIDRS
from ebpf_svc.testbed.host import Node
from tests.lib.waiting import eventually

Item = dict[str, Any]
ADMIN = "admin-of-the-tests"
PORT = 6443
ETCD = "http://127.0.0.1:2379"
START_S = 90.0
STOP_S = 20.0

SLICES_V1: Item = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "endpointslices.discovery.k8s.io",
        "annotations": {"api-approved.kubernetes.io": "unapproved, this server has no v1 yet"},
    },
    "spec": {
        "group": "discovery.k8s.io",
        "scope": "Namespaced",
        "names": {
            "plural": "endpointslices",
            "singular": "endpointslice",
            "kind": "EndpointSlice",
            "listKind": "EndpointSliceList",
        },
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "x-kubernetes-preserve-unknown-fields": True,
                    }
                },
            }
        ],
    },
}
"""discovery.k8s.io/v1 came with 1.21; stored as a custom resource it is watched alike."""


class ApiError(Exception):
    """The server refused; `status` is HTTP's."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status = status


class ControlPlane:
    """Started at once; `close` ends it. Objects outlive the server's death, as etcd lives on."""

    def __init__(self, node: Node, binaries: Path) -> None:
        self._node, self._binaries = node, binaries
        self._folder = node.folders.root / "control-plane"
        self._folder.mkdir()
        key = self._folder / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        (self._folder / "tokens.csv").write_text(f"{ADMIN},admin,admin,system:masters\n")
        self._etcd = self._run(
            "etcd",
            *("--data-dir", str(self._folder / "etcd")),
            *("--listen-client-urls", ETCD, "--advertise-client-urls", ETCD),
        )
        self._server: subprocess.Popen[str] | None = None
        try:
            self.start()
            self.create(SLICES_V1)
            path = "/apis/discovery.k8s.io/v1/endpointslices"
            eventually(lambda: self._answers(path), within_s=START_S)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{PORT}"

    def start(self) -> None:
        """Start the API server and wait until it is ready."""
        ranges = ",".join(SERVICE_CIDRS)
        self._server = self._run(
            str(self._binaries / "kube-apiserver"),
            f"--etcd-servers={ETCD}",
            *("--bind-address=127.0.0.1", f"--secure-port={PORT}"),
            f"--advertise-address={self._node.addresses.v4}",
            f"--cert-dir={self._folder / 'certificates'}",
            *(
                "--feature-gates=IPv6DualStack=true,MixedProtocolLBService=true",
                f"--service-cluster-ip-range={ranges}",
            ),
            "--allow-privileged=true",
            *("--authorization-mode=RBAC", f"--token-auth-file={self._folder / 'tokens.csv'}"),
            # Its own version of slices gives way to the custom resource.
            "--runtime-config=discovery.k8s.io/v1beta1=false",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._folder / 'accounts.key'}",
            f"--service-account-signing-key-file={self._folder / 'accounts.key'}",
            # It would wait for a controller that writes tokens.
            "--disable-admission-plugins=ServiceAccount",
        )
        eventually(lambda: self._answers("/readyz"), within_s=START_S)

    def kill(self) -> None:
        """The API server dies; etcd does not."""
        if self._server is not None:
            self._server.kill()
            self._server.wait(STOP_S)

    def close(self) -> None:
        """End both."""
        self.kill()
        self._etcd.kill()
        self._etcd.wait(STOP_S)

    def forget_history(self) -> None:
        """Compact etcd: whoever watches from before now is told 410 Gone."""
        everything = base64.b64encode(b"\0").decode()
        asked = {"key": everything, "range_end": everything, "keys_only": True, "limit": 1}
        revision = self._ask_etcd("range", asked)["header"]["revision"]
        self._ask_etcd("compaction", {"revision": revision, "physical": True})

    def _ask_etcd(self, call: str, body: Mapping[str, Any]) -> Item:
        """One call of its HTTP gateway, version 3 of the API."""
        where = f"{ETCD}/v3/kv/{call}"
        request = urllib.request.Request(where, data=json.dumps(body).encode())
        with self._node.namespace.entered(), urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.loads(answer.read()))

    def kubeconfig(self, token: str) -> Path:
        """A file with which a client comes in by that token."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "real",
                    "cluster": {
                        "server": self.url,
                        "certificate-authority": str(self._certificate),
                    },
                }
            ],
            "users": [{"name": "agent", "user": {"token": token}}],
            "contexts": [{"name": "real", "context": {"cluster": "real", "user": "agent"}}],
            "current-context": "real",
        }
        path = self._folder / "kubeconfig"
        path.write_text(json.dumps(config))
        return path

    # -- objects -----------------------------------------------------------------------------------

    def create(self, item: Mapping[str, Any], *, dry_run: bool = False) -> Item:
        """Create an object; its status, which only an update may write, included."""
        path = collection_of(item)
        made = self.request("POST", path + ("?dryRun=All" if dry_run else ""), item)
        status = item.get("status")
        if status and not dry_run and made.get("status") != status:
            name = item["metadata"]["name"]
            made = self.request("PUT", f"{path}/{name}/status", {**made, "status": status})
        return made

    def replace(self, item: Mapping[str, Any]) -> Item:
        """Change an object that is there into this."""
        path = f"{collection_of(item)}/{item['metadata']['name']}"
        version = self.request("GET", path)["metadata"]["resourceVersion"]
        metadata = {**item["metadata"], "resourceVersion": version}
        return self.request("PUT", path, {**item, "metadata": metadata})

    def delete(self, item: Mapping[str, Any]) -> None:
        """Delete an object."""
        self.request("DELETE", f"{collection_of(item)}/{item['metadata']['name']}")

    def token_of(self, account: str, namespace: str) -> str:
        """A token as a kubelet puts it into a pod of this ServiceAccount."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        return str(self.request("POST", path, asked)["status"]["token"])

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, token: str = ADMIN
    ) -> Item:
        """Ask the server something; raises ApiError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        context = ssl.create_default_context(cafile=str(self._certificate))
        try:
            with (
                self._node.namespace.entered(),
                urllib.request.urlopen(request, timeout=30, context=context) as answer,
            ):
                said = answer.read()
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, error.read().decode()) from error
        return dict(json.loads(said)) if said[:1] == b"{" else {}

    @property
    def _certificate(self) -> Path:
        return self._folder / "certificates" / "apiserver.crt"

    def _answers(self, path: str) -> bool:
        for process in (self._etcd, self._server):
            assert process is None or process.poll() is None, self._log()
        try:
            self.request("GET", path)
        except (ApiError, OSError):
            return False
        return True

    def _run(self, program: str, *words: str) -> subprocess.Popen[str]:
        name = Path(program).name
        assert shutil.which(program), f"{program} is not there: scripts/kubernetes builds it"
        with (self._folder / f"{name}.log").open("a") as log:
            return self._node.popen(
                [program, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _log(self) -> str:
        tails = (path.read_text()[-2000:] for path in sorted(self._folder.glob("*.log")))
        return "\n".join(tails)


def collection_of(item: Mapping[str, Any]) -> str:
    """The path that lists an object's kind."""
    version, kind = item["apiVersion"], item["kind"]
    plural = {"EndpointSlice": "endpointslices", "PriorityClass": "priorityclasses"}.get(
        kind, kind.lower() + "s"
    )
    base = f"/api/{version}" if version == "v1" else f"/apis/{version}"
    namespace = item["metadata"].get("namespace")
    return f"{base}/namespaces/{namespace}/{plural}" if namespace else f"{base}/{plural}"

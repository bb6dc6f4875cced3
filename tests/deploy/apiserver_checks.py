"""What an API server refuses although the schema allows it, for the kinds in deploy/."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tests.deploy.kustomize import Object

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z")
_REFERENCE = re.compile(r"\$\(([^)]+)\)")
CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "Namespace"}


def findings(objects: list[Object]) -> list[str]:
    """A sentence for each thing that would be refused."""
    return [*_each(objects), *_bindings(objects), *_daemon_sets(objects)]


def _each(objects: list[Object]) -> Iterator[str]:
    keys = ((each["kind"], each["metadata"]["name"]) for each in objects)
    yield from (f"{key} is there twice" for key in _twice(keys))
    for each in objects:
        kind, metadata = each["kind"], each["metadata"]
        where = f"{kind} {metadata['name']}"
        if not _DNS_LABEL.match(metadata["name"]):
            yield f"{where}: not a name"
        if (kind in CLUSTER_SCOPED) == ("namespace" in metadata):
            yield f"{where}: namespace where none belongs, or none where one does"
        for value in metadata.get("labels", {}).values():
            if not isinstance(value, str) or not _LABEL_VALUE.match(value):
                yield f"{where}: label {value!r}"
        for name, text in each.get("data", {}).items():
            if not isinstance(text, str):
                yield f"{where}: data.{name} is no text"


def _bindings(objects: list[Object]) -> Iterator[str]:
    known = {
        (each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"])
        for each in objects
    }
    for each in objects:
        if each["kind"] != "ClusterRoleBinding":
            continue
        role = each["roleRef"]
        if (role["kind"], None, role["name"]) not in known:
            yield f"binding to {role}, which is not there"
        for subject in each["subjects"]:
            if (subject["kind"], subject.get("namespace"), subject["name"]) not in known:
                yield f"binding of {subject}, which is not there"


def _daemon_sets(objects: list[Object]) -> Iterator[str]:
    for each in objects:
        if each["kind"] != "DaemonSet":
            continue
        spec = each["spec"]
        template = spec["template"]
        selected = spec["selector"]["matchLabels"].items()
        if not selected <= template["metadata"]["labels"].items():
            yield "the selector does not match the pods"
        update = spec["updateStrategy"]["rollingUpdate"]
        if update["maxUnavailable"] in (0, "0%") and update.get("maxSurge", 0) in (0, "0%"):
            yield "the update may neither stop nor add a pod"
        yield from _pod(template["spec"])


def _pod(pod: Any) -> Iterator[str]:
    volumes = [each["name"] for each in pod["volumes"]]
    yield from (f"volume {name} is there twice" for name in _twice(volumes))
    yield from (f"volume {name} is no name" for name in volumes if not _DNS_LABEL.match(name))
    for volume in pod["volumes"]:
        if len(volume) != 2:
            yield f"volume {volume['name']} is not of one kind"
    mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
    if unused := set(volumes) - mounted:
        yield f"volumes nobody mounts: {unused}"
    for container in pod["containers"]:
        mounts = container["volumeMounts"]
        yield from (f"{path} is mounted twice" for path in _twice(m["mountPath"] for m in mounts))
        if unknown := {mount["name"] for mount in mounts} - set(volumes):
            yield f"no such volumes: {unknown}"
        privileged = container["securityContext"].get("privileged", False)
        for mount in mounts:
            if mount.get("mountPropagation") == "Bidirectional" and not privileged:
                yield f"{mount['mountPath']}: Bidirectional is for privileged containers"
        env = {each["name"] for each in container.get("env", [])}
        for name in _REFERENCE.findall(" ".join(container.get("args", []))):
            if name not in env:
                yield f"$({name}) stays as it is: no such variable"


def _twice(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]

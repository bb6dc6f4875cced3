"""Every object that is deployed: would an API server take it, and is it what the agent needs?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from ebpf_svc import __version__
from ebpf_svc.config import Settings
from ebpf_svc.config.values import split_host_port
from ebpf_svc.watch.kube import resources
from tests.deploy.apiserver_checks import findings
from tests.deploy.conftest import Deployed, rendered
from tests.deploy.kubelet import settings_of

VERSIONS = ("1.29", "1.33", "1.36")
"""The oldest tried, the first with ServiceCIDRs by default, the one the rules are taken from."""
RULES = [
    ({""}, {"services"}, {"list", "watch"}),
    ({"discovery.k8s.io"}, {"endpointslices"}, {"list", "watch"}),
    ({""}, {"nodes"}, {"get", "list", "watch"}),
    ({"networking.k8s.io"}, {"servicecidrs"}, {"list", "watch"}),
    ({"events.k8s.io"}, {"events"}, {"create", "patch"}),
]
"""W5, to the letter."""


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_in_the_schema_of_each_version(applied: Deployed, version):
    """Fields exist and have the right type; unknown ones count as wrong."""
    for each in applied.objects:
        kubernetes_validate.validate(each, version, strict=True)


def test_unknown_field_is_found_by_the_schema(replacing: Deployed):
    """The schema in use is one that notices."""
    daemon_set = copy.deepcopy(replacing.one("DaemonSet"))
    daemon_set["spec"]["template"]["spec"]["hostnetwork"] = True

    with pytest.raises(kubernetes_validate.ValidationError, match="hostnetwork"):
        kubernetes_validate.validate(daemon_set, VERSIONS[-1], strict=True)


def test_api_server_finds_nothing_to_refuse(applied: Deployed):
    """Names are unique, references lead somewhere, selectors match."""
    assert findings(applied.objects) == []


def _misname_volume(objects: Any) -> None:
    _pod(objects)["volumes"][0]["name"] = "other"


def _drop_privilege(objects: Any) -> None:
    _pod(objects)["containers"][0]["securityContext"]["privileged"] = False


def _drop_variable(objects: Any) -> None:
    _pod(objects)["containers"][0]["env"].clear()


def _rename_role(objects: Any) -> None:
    _one(objects, "ClusterRole")["metadata"]["name"] = "other"


def _relabel_pods(objects: Any) -> None:
    _one(objects, "DaemonSet")["spec"]["template"]["metadata"]["labels"].clear()


def _one(objects: Any, kind: str) -> Any:
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def _pod(objects: Any) -> Any:
    return _one(objects, "DaemonSet")["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "damage",
    [_misname_volume, _drop_privilege, _drop_variable, _rename_role, _relabel_pods],
)
def test_damaged_objects_are_refused_by_the_checks(damage):
    """What stands for the API server's own checks sees what it is there for."""
    objects = rendered("base").objects
    damage(objects)

    assert findings(objects)


def test_rights_are_those_of_the_rule_and_no_more(applied: Deployed):
    """Least privilege (W5), cluster-wide since Services are; nothing else grants anything."""
    rules = applied.one("ClusterRole")["rules"]

    granted = [
        (set(rule["apiGroups"]), set(rule["resources"]), set(rule["verbs"])) for rule in rules
    ]
    assert granted == RULES
    assert {key for rule in rules for key in rule} == {"apiGroups", "resources", "verbs"}
    kinds = [each["kind"] for each in applied.objects]
    assert sorted(kinds) == [
        *("ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet", "ServiceAccount")
    ]


def test_every_watched_kind_may_be_listed_and_watched(deployed: Deployed):
    """The rights follow what the code asks for: a path there is a resource here (W1-W4)."""
    watched = [
        resources.services(""),
        resources.slices(),
        resources.node("node1"),
        resources.service_cidrs(),
    ]
    granted = {
        (group, resource)
        for rule in deployed.one("ClusterRole")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        if {"list", "watch"} <= set(rule["verbs"])
    }

    assert {_resource(each.path) for each in watched} == granted


def _resource(path: str) -> tuple[str, str]:
    """Group and resource of a path such as /apis/discovery.k8s.io/v1/endpointslices."""
    words = path.strip("/").split("/")
    return ("" if words[0] == "api" else words[1]), words[-1]


def test_pod_runs_on_every_node_and_is_the_last_to_go(applied: Deployed):
    """A node without Services is of no use: no taint and no shortage of memory may keep it so."""
    pod = applied.pod

    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert applied.one("DaemonSet")["metadata"]["namespace"] == "kube-system"
    assert set(applied.container["resources"]) == {"requests"}, "a limit would kill or starve it"


def test_pod_lives_in_the_namespaces_of_the_node(applied: Deployed):
    """Its devices, its processes and its resolver, none of which may need a Service."""
    pod = applied.pod

    assert (pod["hostNetwork"], pod["hostPID"], pod["dnsPolicy"]) == (True, True, "Default")
    assert applied.container["securityContext"] == {
        "privileged": True,
        "readOnlyRootFilesystem": True,
    }


def test_no_port_is_declared(applied: Deployed):
    """On the host network the scheduler would keep the pod off a node where kube-proxy has it."""
    assert "ports" not in applied.container


def test_one_agent_a_node_through_a_rollout(deployed: Deployed):
    """Two would fight for ports and maps; part of the nodes is left alone meanwhile."""
    update = deployed.one("DaemonSet")["spec"]["updateStrategy"]

    assert update == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": "10%", "maxSurge": 0},
    }


def test_directories_of_the_agent_are_mounted_from_the_node(deployed: Deployed):
    """Where the settings point is the node's own directory, so nothing is lost with the pod."""
    settings = settings_of(deployed)
    mounts = deployed.mounts()

    for path in (
        settings.ebpf.bpffs,
        settings.ebpf.cache_dir,
        settings.run_dir,
        settings.state_dir,
    ):
        mount, volume = mounts[path]
        assert volume["hostPath"]["path"] == str(path)
        assert not mount.get("readOnly", False)
    assert mounts[settings.ebpf.bpffs][0]["mountPropagation"] == "Bidirectional"


def test_what_the_agent_only_reads_is_mounted_read_only(deployed: Deployed):
    """Headers and the cgroup hierarchy are the node's, and stay as they are."""
    mounts = deployed.mounts()

    for path in map(Path, ("/lib/modules", "/usr/src", "/sys/fs/cgroup")):
        mount, volume = mounts[path]
        assert (volume["hostPath"]["path"], mount["readOnly"]) == (str(path), True)
    assert settings_of(deployed).ebpf.cgroup_root is None, "found by its mount"


def test_lock_of_iptables_is_the_nodes_file(deployed: Deployed):
    """Otherwise two writers of iptables, each with a lock of its own, undo each other."""
    _, volume = deployed.mounts()[Path("/run/xtables.lock")]

    assert volume["hostPath"] == {"path": "/run/xtables.lock", "type": "FileOrCreate"}


def test_probes_ask_livez_where_the_agent_answers(deployed: Deployed):
    """The port is that of the settings; /healthz would restart the pod when the node is drained."""
    address, port = split_host_port(settings_of(deployed).healthz_bind_address)
    container = deployed.container

    assert address in ("0.0.0.0", "127.0.0.1")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"host": "127.0.0.1", "path": "/livez", "port": port}


def test_settings_of_base_and_replacement_keep_kube_proxys_ports():
    """Load balancers and monitoring already look there."""
    defaults = Settings()

    for name in ("base", "overlays/replace-kube-proxy"):
        settings = settings_of(rendered(name))
        assert settings.healthz_bind_address == defaults.healthz_bind_address
        assert settings.metrics_bind_address == defaults.metrics_bind_address


def test_image_has_the_version_of_the_agent(applied: Deployed):
    """No `latest`: a node that restarts runs what its neighbours run."""
    assert applied.container["image"] == f"ebpf-svc:{__version__}"
    assert applied.container["imagePullPolicy"] == "IfNotPresent"


def test_api_server_can_be_named_without_a_service(deployed: Deployed):
    """Its address may come from a ConfigMap that need not be there."""
    assert deployed.container["envFrom"] == [
        {"configMapRef": {"name": "kubernetes-services-endpoint", "optional": True}}
    ]

"""What each overlay makes of the agent, read from its own arguments and ConfigMaps."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path

from ebpf_svc.cli.migrate import command as migrate
from ebpf_svc.config import Mode
from ebpf_svc.host.kubeproxy import STOP_IT
from ebpf_svc.migrate.undo import BRING_BACK
from ebpf_svc.watch.kube import resources
from tests.deploy.conftest import DEPLOY, WAY_BACK, Deployed, rendered
from tests.deploy.kubelet import NODE, kube_proxy, kubeconfig_of, loaded_of, settings_of, written_by
from tests.deploy.kustomize import load, merge

REPLACE = DEPLOY / "overlays/replace-kube-proxy"


def test_arguments_are_understood_by_the_command_line(deployed: Deployed, tmp_path):
    """The pod starts: flags exist, files are read, nothing in them is unknown."""
    assert f"nodeName: {NODE}\n" in written_by(deployed, tmp_path)


def test_settings_give_no_warning(deployed: Deployed):
    """What kubeadm writes for kube-proxy and what is written here are all understood."""
    assert loaded_of(deployed).warnings == ()


def test_node_name_is_the_pods_node(deployed: Deployed):
    """Not the host name, which may differ (W7)."""
    assert settings_of(deployed).node_name == NODE


def test_best_dataplane_serves_whatever_kube_proxy_was_told(deployed: Deployed):
    """Its file says iptables; nobody puts this in its place for that."""
    assert settings_of(deployed).mode is Mode.AUTO


def test_replacement_takes_kube_proxys_settings_and_api_server(replacing: Deployed):
    """Its cluster CIDR decides who is masqueraded; its kubeconfig needs no Service."""
    settings = settings_of(replacing)
    kubeconfig = settings.kubernetes.kubeconfig

    assert settings.cluster_cidrs == ("10.244.0.0/16",)
    assert kubeconfig == Path("/var/lib/kube-proxy/kubeconfig.conf")
    _, volume = replacing.mounts()[kubeconfig.parent]
    assert volume["configMap"] == {"name": "kube-proxy"}
    (user,) = kubeconfig_of(kube_proxy("ConfigMap"))["users"]
    assert user["user"] == {"tokenFile": "/var/run/secrets/kubernetes.io/serviceaccount/token"}
    assert replacing.pod["automountServiceAccountToken"] is True


def test_replacement_serves_what_kube_proxy_served(replacing: Deployed):
    """Services with a label for another proxy stay that one's (W1)."""
    name = settings_of(replacing).kubernetes.service_proxy_name

    assert resources.services(name).selectors["labelSelector"] == (
        "!service.kubernetes.io/service-proxy-name"
    )


def test_agent_beside_serves_labelled_services_only(beside: Deployed):
    """Those which kube-proxy leaves alone by the same label (W1)."""
    name = settings_of(beside).kubernetes.service_proxy_name

    assert resources.services(name).selectors["labelSelector"] == (
        "service.kubernetes.io/service-proxy-name=ebpf-svc"
    )


def test_agent_beside_leaves_kube_proxy_its_ports(beside: Deployed):
    """Both run on one node, on the host network."""
    theirs = settings_of(rendered("base"))
    ours = settings_of(beside)

    assert {ours.healthz_bind_address, ours.metrics_bind_address}.isdisjoint(
        {theirs.healthz_bind_address, theirs.metrics_bind_address}
    )


def test_stopping_kube_proxy_and_starting_it_again_changes_nothing_else():
    """One patch takes its nodes away, the other gives the DaemonSet back as it was."""
    before = kube_proxy("DaemonSet")
    (stop,), (start,) = (
        load(REPLACE / "stop-kube-proxy.yaml"),
        load(REPLACE / "start-kube-proxy.yaml"),
    )

    stopped = merge(copy.deepcopy(before), stop)

    selector = stopped["spec"]["template"]["spec"].pop("nodeSelector")
    assert selector == {"kubernetes.io/os": "linux", "ebpf-svc.io/no-kube-proxy": "true"}
    stopped["spec"]["template"]["spec"]["nodeSelector"] = selector
    assert merge(stopped, start) == before


def test_patches_are_those_that_migrate_asks_for():
    """Who follows the command's words and who follows the files does the same."""
    for file, words in (("stop-kube-proxy.yaml", STOP_IT), ("start-kube-proxy.yaml", BRING_BACK)):
        (patch,) = load(REPLACE / file)
        assert json.loads(shlex.split(words)[-1]) == patch


def test_take_over_removes_what_kube_proxy_left_once_it_may(replacing: Deployed):
    """It asks again until the agent is ready and kube-proxy gone, with the agent's own eyes."""
    agent, take_over = replacing.one("DaemonSet")["spec"]["template"]["spec"]["containers"]
    (words,) = re.findall(r"until ebpf-svc migrate (.*); do", take_over["command"][-1])

    options = migrate.make_context("migrate", shlex.split(words)).params
    assert (options["back"], options["yes"], options["wait_s"]) == (False, True, 300)
    assert take_over["image"] == agent["image"]
    assert take_over["securityContext"] == agent["securityContext"]
    places = {each["name"]: each["mountPath"] for each in agent["volumeMounts"]}
    assert all(places[each["name"]] == each["mountPath"] for each in take_over["volumeMounts"])


def test_way_back_undoes_on_each_node_and_tells_when_it_is_done():
    """The command is one that exists; nothing restarts a pod that waits for connections."""
    container = rendered(WAY_BACK).container
    shell, option, script = container["command"]
    (undo,) = re.findall(r"until ebpf-svc migrate (.*); do", script)

    assert (shell, option) == ("/bin/sh", "-c")
    options = migrate.make_context("migrate", shlex.split(undo)).params
    assert (options["back"], options["yes"]) == (True, True)
    assert "livenessProbe" not in container
    assert "startupProbe" not in container
    done = container["readinessProbe"]["exec"]["command"][-1]
    assert f"touch {done}\n" in script


def test_way_back_does_not_wait_from_node_to_node():
    """One long-lived connection must not keep all other nodes from going back."""
    update = rendered(WAY_BACK).one("DaemonSet")["spec"]["updateStrategy"]

    assert update["rollingUpdate"] == {"maxUnavailable": "100%", "maxSurge": 0}

"""What a kubelet makes of a pod: files from ConfigMaps, arguments with variables filled in."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from ebpf_svc.cli.run import command as run
from ebpf_svc.cli.settings import load_options
from ebpf_svc.config import Settings
from ebpf_svc.config.load import Loaded
from tests.deploy.conftest import Deployed
from tests.deploy.kustomize import Object, load

NODE = "node-a"
KUBE_PROXY = Path(__file__).parent / "kube-proxy.yaml"


def kube_proxy(kind: str) -> Any:
    """An object of kube-proxy as kubeadm installs it."""
    (found,) = (each for each in load(KUBE_PROXY) if each["kind"] == kind)
    return found


def settings_of(deployed: Deployed) -> Settings:
    """The settings an agent would come up with in that pod, on a node named `NODE`."""
    return loaded_of(deployed).settings


def loaded_of(deployed: Deployed) -> Loaded:
    """The same, with warnings and origins."""
    with tempfile.TemporaryDirectory() as folder:
        context = run.make_context("run", arguments(deployed, Path(folder)))
        return load_options(context.params)


def written_by(deployed: Deployed, folder: Path) -> str:
    """What `ebpf-svc run … --write-config-to` writes in that pod, through the command line."""
    out = folder / "effective.yaml"
    result = CliRunner().invoke(run, [*arguments(deployed, folder), f"--write-config-to={out}"])
    assert result.exit_code == 0, result.output
    return out.read_text()


def arguments(deployed: Deployed, folder: Path) -> list[str]:
    """Those after `run`; the ConfigMaps' files are written below `folder`, and named there."""
    container = deployed.container
    first, *words = container["args"]
    assert first == "run"
    config_maps = {each["metadata"]["name"]: each for each in _config_maps(deployed)}
    text = shlex.join(words)
    for variable in container["env"]:
        assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
        text = text.replace(f"$({variable['name']})", NODE)
    for path, (_, volume) in deployed.mounts().items():
        if "configMap" not in volume:
            continue
        for name, content in config_maps[volume["configMap"]["name"]]["data"].items():
            file = folder / path.relative_to("/") / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
            text = text.replace(str(path / name), str(file))
    return shlex.split(text)


def _config_maps(deployed: Deployed) -> list[Object]:
    return [
        *(each for each in deployed.objects if each["kind"] == "ConfigMap"),
        kube_proxy("ConfigMap"),
    ]


def kubeconfig_of(config_map: Object) -> Any:
    """The kubeconfig in kube-proxy's ConfigMap."""
    return yaml.safe_load(config_map["data"]["kubeconfig.conf"])

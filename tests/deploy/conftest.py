"""What is deployed, rendered: the base and each overlay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.kustomize import Object, render

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
AGENTS = ("base", "overlays/beside", "overlays/replace-kube-proxy")
"""What serves."""
WAY_BACK = "overlays/give-back"


@dataclass(frozen=True)
class Deployed:
    """The objects of one kustomization."""

    name: str
    objects: list[Object]

    def one(self, kind: str) -> Any:
        """The only object of its kind."""
        (found,) = (each for each in self.objects if each["kind"] == kind)
        return found

    @property
    def pod(self) -> Any:
        return self.one("DaemonSet")["spec"]["template"]["spec"]

    @property
    def container(self) -> Any:
        """The agent's."""
        (found,) = (each for each in self.pod["containers"] if each["name"] == "ebpf-svc")
        return found

    def mounts(self) -> dict[Path, tuple[Any, Any]]:
        """By path in the container: the mount and its volume."""
        volumes = {each["name"]: each for each in self.pod["volumes"]}
        return {
            Path(each["mountPath"]): (each, volumes[each["name"]])
            for each in self.container["volumeMounts"]
        }


@pytest.fixture(params=[*AGENTS, WAY_BACK])
def applied(request: pytest.FixtureRequest) -> Deployed:
    """Each kustomization in turn."""
    return rendered(request.param)


@pytest.fixture(params=AGENTS)
def deployed(request: pytest.FixtureRequest) -> Deployed:
    """Each that serves, in turn."""
    return rendered(request.param)


@pytest.fixture
def replacing() -> Deployed:
    """What takes kube-proxy's place."""
    return rendered("overlays/replace-kube-proxy")


@pytest.fixture
def beside() -> Deployed:
    """What serves chosen Services next to kube-proxy."""
    return rendered("overlays/beside")


def rendered(name: str) -> Deployed:
    """Render a folder of deploy/."""
    return Deployed(name, render(DEPLOY / name))

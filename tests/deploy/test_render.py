"""The renderer of these tests against kubectl's."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml

from tests.deploy.conftest import DEPLOY, Deployed


def _by_name(objects):
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomization_renders_here_as_kubectl_renders_it(applied: Deployed):
    """What these tests judge is what `kubectl apply -k` sends."""
    argv = ["kubectl", "kustomize", str(DEPLOY / applied.name)]
    printed = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout

    assert _by_name(yaml.safe_load_all(printed)) == _by_name(applied.objects)

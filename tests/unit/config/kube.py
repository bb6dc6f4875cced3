"""Builders: files of both kinds, and what is loaded from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ebpf_svc.config.document import (
    API_VERSION,
    KIND,
    KUBE_PROXY_API_VERSION,
    KUBE_PROXY_KIND,
)
from ebpf_svc.config.given import Given
from ebpf_svc.config.load import Loaded, load


def kube_proxy(**fields: Any) -> str:
    """A KubeProxyConfiguration."""
    return yaml.safe_dump({"apiVersion": KUBE_PROXY_API_VERSION, "kind": KUBE_PROXY_KIND, **fields})


def ours(**fields: Any) -> str:
    """An EbpfSvcConfiguration."""
    return yaml.safe_dump({"apiVersion": API_VERSION, "kind": KIND, **fields})


def load_text(
    folder: Path,
    *texts: str,
    flags: Mapping[str, Given] | None = None,
    kube_flags: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load the files `1.yaml`, `2.yaml` … of these texts."""
    paths = []
    for number, text in enumerate(texts, 1):
        paths.append(folder / f"{number}.yaml")
        paths[-1].write_text(text)
    return load(paths, flags, kube_flags)

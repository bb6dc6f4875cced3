"""Names of chains as kube-proxy makes them, which operators and tools know (I17, X16). Pure."""

from __future__ import annotations

import base64
import hashlib

from ebpf_svc.model.desired import Backend
from ebpf_svc.model.service import ServicePortName

NFT_NAME_LENGTH = 240
"""Longest name without its prefix; the kernel takes 255 bytes (X16)."""
_ELLIPSIS = "..."


def endpoint_text(backend: Backend) -> str:
    """An endpoint as kube-proxy writes it: `10.0.0.1:80`, `[fd00::1]:80` (E8)."""
    host = f"[{backend.address}]" if ":" in backend.address else backend.address
    return f"{host}:{backend.port}"


def iptables_hash(port: ServicePortName, backend: Backend | None = None) -> str:
    """The 16 characters that follow KUBE-SVC-, KUBE-EXT-, …, with a backend KUBE-SEP- (I17)."""
    text = f"{port}{port.protocol.value.lower()}"
    if backend is not None:
        text += endpoint_text(backend)
    return _hash(text)[:16]


def nft_name(port: ServicePortName, backend: Backend | None = None) -> str:
    """What follows service-, local-, external-, …, with a backend endpoint- and affinity- (X16)."""
    text = f"{port.namespace}/{port.name}/{port.protocol.value.lower()}/{port.port}"
    if backend is not None:
        text += f"__{backend.address.replace(':', '.')}/{backend.port}"
    name = f"{_hash(text)[:8]}-{text}"
    if len(name) > NFT_NAME_LENGTH:
        name = name[: NFT_NAME_LENGTH - len(_ELLIPSIS)] + _ELLIPSIS
    return name


def _hash(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()

"""Objects as an API server returns them: all the fields it fills in, managedFields included."""

from __future__ import annotations

from typing import Any

Item = dict[str, Any]

_WHEN = "2026-09-01T10:00:00Z"


def service(number: int) -> Item:
    """A Service with one port, numbered from 0."""
    name, address = service_name(number), f"10.{96 + (number >> 16)}.{_low_bytes(number)}"
    return {
        "metadata": {
            **_meta(number, name),
            "labels": {"app": name, "app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": name},
            "managedFields": _managed("helm", {"f:internalTrafficPolicy": {}, "f:ports": {}}),
        },
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
            "selector": {"app": name},
            "clusterIP": address,
            "clusterIPs": [address],
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(number: int, endpoints: int, *, shift: int = 0, trigger_time: str = "") -> Item:
    """The EndpointSlice of a Service.

    Args:
        number: of the Service.
        endpoints: how many.
        shift: other numbers, other addresses of the last endpoint.
        trigger_time: RFC 3339; when the change it stands for happened.
    """
    owner = service_name(number)
    meta = {
        **_meta(1_000_000 + number, f"{owner}-x7k2p"),
        "generateName": f"{owner}-",
        "generation": 3 + shift,
        "labels": {
            "app": owner,
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": owner,
        },
        "annotations": {
            "endpoints.kubernetes.io/last-change-trigger-time": trigger_time or _WHEN,
        },
        "ownerReferences": [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "name": owner,
                "uid": _uid(number),
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
        "managedFields": _managed(
            "kube-controller-manager", {"f:addressType": {}, "f:endpoints": {}, "f:ports": {}}
        ),
    }
    return {
        "metadata": meta,
        "addressType": "IPv4",
        "endpoints": [
            _endpoint(number, number * endpoints + i, shift if i == endpoints - 1 else 0)
            for i in range(endpoints)
        ],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def _endpoint(number: int, pod: int, shift: int) -> Item:
    return {
        "addresses": [f"10.{128 + (pod >> 16) + 16 * (shift % 2)}.{_low_bytes(pod)}"],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "targetRef": {
            "kind": "Pod",
            "namespace": namespace(number),
            "name": f"{service_name(number)}-5d4f7b9c6-{pod:05d}",
            "uid": _uid(pod),
        },
        "nodeName": f"node-{pod % 100}",
        "zone": f"zone-{pod % 3}",
    }


def node(name: str) -> Item:
    """A Node, ready, with an address of each family."""
    return {
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/hostname": name,
                "topology.kubernetes.io/zone": "zone-1",
            },
        },
        "spec": {"podCIDR": "10.128.0.0/24", "podCIDRs": ["10.128.0.0/24"]},
        "status": {
            "addresses": [
                {"type": "Hostname", "address": name},
                {"type": "InternalIP", "address": "192.168.0.11"},
                {"type": "InternalIP", "address": "fd00:192::11"},
            ]
        },
    }


def namespace(number: int) -> str:
    """Where a Service lives."""
    return f"team-{number % 50}"


def service_name(number: int) -> str:
    """What a Service is called."""
    return f"service-{number:05d}"


def _meta(number: int, name: str) -> Item:
    return {
        "name": name,
        "namespace": namespace(number % 1_000_000),
        "uid": _uid(number),
        "creationTimestamp": _WHEN,
    }


def _managed(manager: str, fields: Item) -> list[Item]:
    return [
        {
            "manager": manager,
            "operation": "Update",
            "apiVersion": "v1",
            "time": _WHEN,
            "fieldsType": "FieldsV1",
            "fieldsV1": {
                **fields,
                "f:metadata": {
                    "f:annotations": {".": {}, "f:meta.helm.sh/release-name": {}},
                    "f:labels": {".": {}, "f:app": {}, "f:kubernetes.io/service-name": {}},
                },
            },
        }
    ]


def _uid(number: int) -> str:
    return f"6f1d2c9e-58b7-4a5e-9d3c-{number:012d}"


def _low_bytes(number: int) -> str:
    return f"{number >> 8 & 255}.{number & 255}"

"""Render a kustomization, as much of kustomize as deploy/ uses.

`resources` (files and folders) and `patches` (files: a strategic merge that finds its object by
kind and name, or a JSON patch with a `target`). Anything else is refused, so that no test judges
what kubectl would render otherwise. test_render.py compares with kubectl where there is one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
}
"""What Kubernetes tells the elements of a list apart by; other lists are replaced."""


def render(folder: Path) -> list[Object]:
    """Every object of a kustomization, in no order that means anything."""
    (kustomization,) = load(folder / "kustomization.yaml")
    fields = set(kustomization) - {"apiVersion", "kind"}
    assert fields <= {"resources", "patches"}, f"{folder}: {fields} are more than this renders"
    objects: list[Object] = []
    for name in kustomization["resources"]:
        path = folder / name
        objects += render(path) if path.is_dir() else load(path)
    for patch in kustomization.get("patches", []):
        _apply(objects, load(folder / patch["path"]), patch.get("target"))
    return objects


def load(path: Path) -> list[Any]:
    """The documents of a file."""
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


def merge(old: Any, patch: Any, key: str = "") -> Any:
    """Merge as `kubectl patch --type strategic` does; null removes."""
    if isinstance(old, dict) and isinstance(patch, dict):
        assert not [word for word in patch if word.startswith("$")], "directives are not rendered"
        names = [*old, *(name for name in patch if name not in old)]
        merged = {
            name: merge(old.get(name), patch[name], name) if name in patch else old[name]
            for name in names
        }
        return {name: value for name, value in merged.items() if value is not None}
    if isinstance(old, list) and isinstance(patch, list) and key in MERGE_KEYS:
        by = MERGE_KEYS[key]
        found = {each[by]: each for each in old}
        for each in patch:
            found[each[by]] = merge(found.get(each[by]), each)
        return list(found.values())
    return copy.deepcopy(patch)


def _apply(objects: list[Object], documents: list[Any], target: dict[str, str] | None) -> None:
    for document in documents:
        if isinstance(document, list):
            assert target, "a JSON patch needs a target"
            position = _find(objects, target["kind"], target["name"])
            for operation in document:
                _operate(objects[position], operation)
            return
        position = _find(objects, document["kind"], document["metadata"]["name"])
        objects[position] = merge(objects[position], document)


def _find(objects: list[Object], kind: str, name: str) -> int:
    (position,) = (
        index
        for index, each in enumerate(objects)
        if (each["kind"], each["metadata"]["name"]) == (kind, name)
    )
    return position


def _operate(document: Any, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902: add, replace or remove."""
    *parents, last = operation["path"].lstrip("/").split("/")
    for word in parents:
        document = document[int(word) if isinstance(document, list) else word]
    value = copy.deepcopy(operation.get("value"))
    match operation["op"], document:
        case "add", list():
            document.insert(len(document) if last == "-" else int(last), value)
        case "add", _:
            document[last] = value
        case "replace", list():
            document[int(last)] = value
        case "replace", _:
            assert last in document
            document[last] = value
        case "remove", list():
            del document[int(last)]
        case "remove", _:
            del document[last]
        case op, _:
            raise AssertionError(f"{op} is more than this renders")

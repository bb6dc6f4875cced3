"""Describe the configuration: the tables of docs/configuration.md and of `ebpf-svc config`.

`python -m ebpf_svc.config.reference docs/configuration.md` writes them into the page anew.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ebpf_svc.config.given import leaves, spelt, value_of
from ebpf_svc.config.kubeproxy.convert import is_active, value_at
from ebpf_svc.config.kubeproxy.fields import DEPRECATED_PORTS, FIELDS, Treatment
from ebpf_svc.config.kubeproxy.types import KubeProxyConfiguration
from ebpf_svc.config.live import LIVE_FIELDS
from ebpf_svc.config.load import Loaded
from ebpf_svc.config.settings import Settings
from ebpf_svc.config.write import docstrings, plain

SETTING_COLUMNS = ("setting", "default", "live", "meaning")
KUBE_COLUMNS = ("field", "default", "flag", "here", "setting", "remark")
EFFECTIVE_COLUMNS = ("setting", "value", "from")
KUBE_EFFECTIVE_COLUMNS = ("field", "value", "here", "setting", "from", "remark")


def setting_rows() -> list[list[str]]:
    """Every setting of ours: name in a file, default, whether it changes live, meaning."""
    defaults = Settings()
    rows = []
    for path in leaves():
        *sections, name = path.split(".")
        section: BaseModel = value_of(defaults, ".".join(sections)) if sections else defaults
        model = type(section)
        live = "yes" if path in LIVE_FIELDS else ""
        rows.append([spelt(path), text_of(path, defaults), live, docstrings(model).get(name, "")])
    return rows


def kube_rows() -> list[list[str]]:
    """Every field of kube-proxy's: default, flag, what becomes of it."""
    defaults = KubeProxyConfiguration()
    deprecated = {path: name for name, path in DEPRECATED_PORTS.items()}
    rows = []
    for field in FIELDS:
        flags = [*field.flags, *filter(None, [deprecated.get(field.path)])]
        setting = spelt(field.setting) if field.setting else ""
        default = _file_value(defaults, field.path)
        rows.append(
            [field.path, default, " ".join(flags), field.treatment.value, setting, field.why]
        )
    return rows


def effective_rows(loaded: Loaded) -> list[list[str]]:
    """Every setting with its value and where that came from."""
    return [
        [spelt(path), text_of(path, loaded.settings), loaded.origins[path]] for path in leaves()
    ]


def kube_effective_rows(loaded: Loaded) -> list[list[str]]:
    """Fields kube-proxy's file or flags gave: value, what becomes of it, where it came from.

    What is ignored and as by default is left out, as is what a flag gave to sections not in use.
    """
    config = loaded.kube_proxy
    if config is None:
        return []
    defaults, rows = KubeProxyConfiguration(), []
    for field in FIELDS:
        if field.path not in loaded.said_by_kube_proxy:
            continue
        origin = loaded.said_by_kube_proxy[field.path]
        value = _file_value(config, field.path)
        if field.treatment is Treatment.IGNORED and value == _file_value(defaults, field.path):
            continue
        here, why = field.treatment.value, field.why
        if not is_active(field, config.mode):
            if origin.startswith("--"):
                continue  # a flag for several sections; the one in use has its own row
            here, why = "unused", f'kube-proxy does not read it in mode "{config.mode}"'
        setting = spelt(field.setting) if field.setting else ""
        rows.append([field.path, value, here, setting, origin, why])
    return rows


def text_of(path: str, settings: Settings) -> str:
    """A setting as a file would hold it, on one line."""
    value = plain(path, value_of(settings, path))
    return _text(value)


def _file_value(config: KubeProxyConfiguration, path: str) -> str:
    value: Any = config.as_file()
    for word in path.split("."):
        # Left out where a file has it seldom.
        value = value.get(word, value_at(config, path)) if isinstance(value, dict) else value
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], code: int) -> str:
    """A table; so many columns from the left are code."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in rows:
        cells = [f"`{cell}`" if cell and number < code else cell for number, cell in enumerate(row)]
        lines.append(" | ".join(cell.replace("|", r"\|") for cell in cells))
    return "".join(f"| {line} |\n" for line in lines)


def fill(page: str) -> str:
    """Replace what stands between the marks of a page by today's tables."""
    tables = {
        "settings": markdown(SETTING_COLUMNS, setting_rows(), 2),
        "kube-proxy": markdown(KUBE_COLUMNS, kube_rows(), 3),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        page = pattern.sub(lambda _, text=f"{begin}{table}{end}": text, page)  # type: ignore[misc]
    return page


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        Path(argument).write_text(fill(Path(argument).read_text()))

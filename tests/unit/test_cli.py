"""The command line as a user meets it: output, exit codes, words when something is wrong."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ebpf_svc import cli, status
from ebpf_svc.cli import COMMANDS, main
from ebpf_svc.cli.output import print_table
from ebpf_svc.config import Mode
from ebpf_svc.control import Progress, Step, SwitchRequest
from ebpf_svc.dataplane.base import ApplyReport, Check, Support
from ebpf_svc.dataplane.inspect import FlowView, KernelPart
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host.lock import DirectoryLock
from ebpf_svc.model.desired import (
    Backend,
    DesiredState,
    Frontend,
    FrontendKey,
    FrontendKind,
    FrontendView,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.model.service import ServicePortName
from ebpf_svc.model.snapshot import Problem

VIP = FrontendKey("10.96.0.1", 80, Protocol.TCP)
NODE_PORT = FrontendKey("192.0.2.1", 30080, Protocol.TCP)
DNS = FrontendKey("fd00::a", 53, Protocol.UDP)
WEB = ServicePlan(
    PlanKey(ServicePortName("shop", "web", "http", Protocol.TCP), Family.V4),
    (
        Frontend(VIP, FrontendKind.CLUSTER_IP),
        Frontend(NODE_PORT, FrontendKind.NODE_PORT, masquerade_for=Sources.EXTERNAL),
    ),
    (
        Backend("10.244.0.5", 8080, in_local=True),
        Backend("10.244.1.6", 8080),
        Backend("10.244.1.7", 8080, in_cluster=False),
    ),
    has_endpoints=True,
    affinity_s=10800,
)
NAMES = ServicePlan(
    PlanKey(ServicePortName("kube-system", "dns", "", Protocol.UDP), Family.V6),
    (Frontend(DNS, FrontendKind.CLUSTER_IP),),
    (),
    has_endpoints=False,
)
DESIRED = DesiredState({plan.key: plan for plan in (WEB, NAMES)}, revision=7)


@dataclass
class Kernel:
    """A dataplane that shows what it was given."""

    held: dict[FrontendKey, FrontendView] = field(default_factory=DESIRED.view)
    checks: tuple[Check, ...] = (Check("bpffs", True, "/sys/fs/bpf"),)
    installed: list[KernelPart] = field(
        default_factory=lambda: [KernelPart("map", "frontends4", "/sys/fs/bpf/x", "2 entries")]
    )
    stuck: bool = False
    name: str = "ebpf"

    def check(self) -> Support:
        return Support(self.name, self.checks)

    def open(self) -> None: ...
    def close(self) -> None: ...
    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        raise AssertionError("a command that looks must not write")

    def read(self) -> dict[FrontendKey, FrontendView]:
        return self.held

    def flows(self) -> Iterable[FlowView]:
        yield FlowView("10.244.0.9", 4711, VIP, "10.244.0.5", 8080, "established", 3, Family.V4)

    def parts(self) -> Iterable[KernelPart]:
        return list(self.installed)

    def cleanup(self) -> None:
        if self.stuck:
            raise DataplaneError("the map is busy")
        self.installed.clear()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[list[str]]:
        """The table: the words of each line after the headline."""
        return [line.split() for line in self.out.splitlines()[1:]]

    def json(self) -> Any:
        return json.loads(self.out)


class Tool:
    """The command line with the kernel replaced and its own run directory."""

    def __init__(
        self, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.run_dir, self.kernel, self._capsys = run_dir, Kernel(), capsys
        self.refused: dict[str, str] = {}
        self._place = ("--run-dir", str(run_dir), "--bpffs", str(run_dir.parent))
        for name in ("show", "check", "cleanup"):
            module = importlib.import_module(f"ebpf_svc.cli.{name}")
            monkeypatch.setattr(module, "make_dataplane", lambda mode, settings: self.kernel)

    def __call__(self, command: str, *words: str) -> Outcome:
        with pytest.raises(SystemExit) as end:
            main([command, *words, *self._place])
        code = end.value.code
        assert code is None or isinstance(code, int)
        out, err = self._capsys.readouterr()
        return Outcome(code or 0, out, err)

    def sync(self, *problems: Problem) -> None:
        """Leave the files an agent leaves."""
        writer = status.StatusWriter(
            self.run_dir, node="node1", serving=lambda: {"mode": "ebpf", "refused": self.refused}
        )
        writer.starting()
        writer.synced(DESIRED, problems=problems, failed=(), took_ms=1.0)


@pytest.fixture
def tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Tool:
    return Tool(tmp_path / "run", capsys, monkeypatch)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` is where a newcomer starts: it lists the commands and the first steps."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert "First steps" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command teaches itself with a call one can copy."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    out = capsys.readouterr().out
    assert "Example:" in out
    assert f"ebpf-svc {name}" in out


def test_wrong_setting_is_one_line_and_exit_code_two(tool: Tool) -> None:
    """No traceback: which option, what it got, what it expects, where to read on."""
    done = tool("run", "--socket-lb", "no")
    assert done.code == 2
    assert done.err.splitlines() == [
        "ebpf-svc: --socket-lb: got 'no', expected 'full', 'hostOnly' or 'off'",
        "  see: ebpf-svc run --help",
    ]


def test_unknown_command_is_a_usage_error(tool: Tool) -> None:
    """Click's words, exit code 2."""
    done = tool("serve")
    assert done.code == 2
    assert "No such command 'serve'" in done.err


def test_run_loads_neither_rich_nor_kubernetes() -> None:
    """What the agent does not need would cost its start and its memory."""
    code = (
        "import sys, ebpf_svc.cli.run, ebpf_svc.daemon\n"
        "print(sorted({'rich', 'kubernetes', 'bcc', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_show_joins_kernel_and_names(tool: Tool) -> None:
    """A service port is one row: its addresses from the kernel, its name from the agent."""
    tool.sync()
    shown = tool("show")
    assert shown.code == 0
    heading, *rows = shown.rows
    assert " ".join(heading) == (
        "SERVICE PROTOCOL CLUSTER IPS PORT NODE PORT EXTERNAL AFFINITY S BACKENDS ACTIVE"
    )
    assert rows == [
        ["kube-system/dns", "UDP", "fd00::a", "53", "-", "-", "-", "-", "-"],
        ["shop/web:http", "TCP", "10.96.0.1", "80", "30080", "-", "10800", "3", "2"],
    ]


def test_show_into_a_pipe_is_plain_and_aligned(tool: Tool) -> None:
    """No colours, no boxes, nothing cut: columns start where their headings do."""
    tool.sync()
    _, heading, *rows = tool("show").out.splitlines()
    assert "\x1b" not in heading
    at = heading.index("PROTOCOL")
    assert [row[at : at + 3] for row in rows] == ["UDP", "TCP"]


def test_table_on_a_terminal_has_colours_and_whole_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What looks like markup is printed as it is; a narrow terminal folds, it does not cut."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    print_table(["frontend", "kind"], [["[fd00::a]:53/UDP", "ClusterIP"]], styles=["cyan"])
    text = terminal.getvalue()
    assert "\x1b[" in text
    assert "[fd00::a]:53/UDP" in text


def test_show_backends_says_who_gets_new_flows(tool: Tool) -> None:
    """Active, local and draining endpoints are told apart."""
    tool.sync()
    states = {
        record["address"]: record["state"]
        for record in tool("show", "backends", "--json").json()["backends"]
    }
    assert states == {
        "10.244.0.5": "active, local",
        "10.244.1.6": "active",
        "10.244.1.7": "draining",
    }


def test_show_frontends_tells_the_matrix(tool: Tool) -> None:
    """Who is masqueraded and whether the address balances or refuses."""
    tool.sync()
    records = {
        record["frontend"]: record
        for record in tool("show", "frontends", "--json").json()["frontends"]
    }
    assert records["192.0.2.1:30080/TCP"]["masquerade_for"] == ["external"]
    assert records["[fd00::a]:53/UDP"]["without_endpoints"] == "refuses"
    assert records["10.96.0.1:80/TCP"]["service"] == "shop/web:http"


def test_show_flows_names_client_service_and_backend(tool: Tool) -> None:
    """A flow is shown with the service it belongs to."""
    tool.sync()
    (flow,) = tool("show", "flows", "--json").json()["flows"]
    assert flow == {
        "client": "10.244.0.9:4711",
        "frontend": "10.96.0.1:80/TCP",
        "service": "shop/web:http",
        "backend": "10.244.0.5:8080",
        "state": "established",
        "idle_s": 3,
    }


def test_show_of_a_namespace_leaves_out_others(tool: Tool) -> None:
    """`-n` chooses by the names the agent wrote down."""
    tool.sync()
    records = tool("show", "-n", "shop", "--json").json()["services"]
    assert [record["service"] for record in records] == ["shop/web:http"]


def test_show_without_an_agent_shows_the_kernel(tool: Tool) -> None:
    """Traffic goes on without an agent, and what it goes by can be looked at (Z2)."""
    shown = tool("show", "frontends")
    assert shown.out.startswith("No agent runs here")
    assert "10.96.0.1:80/TCP" in shown.out
    assert "?" in shown.out


def test_show_with_an_agent_names_it(tool: Tool) -> None:
    """The headline says who serves and since when."""
    tool.sync()
    with DirectoryLock(tool.run_dir):
        shown = tool("show")
        record = tool("show", "--json").json()["agent"]
    assert "on node1, mode ebpf, revision 7" in shown.out
    assert (record["running"], record["revision"]) == (True, 7)


def test_show_says_which_modes_were_refused(tool: Tool) -> None:
    """Whoever wonders about the mode need not read the log of the start."""
    tool.refused = {"ebpf": "BTF: not there"}
    tool.sync()
    with DirectoryLock(tool.run_dir):
        shown = tool("show")
        record = tool("show", "--json").json()["agent"]
    assert shown.out.splitlines()[0] == "Mode ebpf cannot run: BTF: not there"
    assert record["refused"] == tool.refused


def test_show_of_nothing_says_so(tool: Tool) -> None:
    """An empty table would leave the reader guessing."""
    tool.kernel.held = {}
    assert "No service is served here." in tool("show").out


def test_problems_are_counted_everywhere_and_listed_on_request(tool: Tool) -> None:
    """A skipped object is told with file, object, field and the reason."""
    tool.sync(Problem("web.yaml", "Service shop/x", "spec.ports[0].port", "must be 1..65535"))
    assert tool("show").out.endswith("1 problem: ebpf-svc show problems\n")
    (_, row) = tool("show", "problems").rows
    assert " ".join(row) == "web.yaml Service shop/x spec.ports[0].port must be 1..65535"


def test_check_that_passes_exits_zero(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All required things are there; what only limits does not fail the check."""
    monkeypatch.setattr("ebpf_svc.cli.check.host_checks", lambda settings: ())
    tool.kernel.checks += (Check("kheaders", False, "none", "apt-get install …", required=False),)
    checked = tool("check", "--json")
    assert checked.code == 0
    assert checked.json()["ok"] is True


def test_check_that_fails_says_how_to_mend_it(tool: Tool) -> None:
    """A missing requirement: exit code 1, and the command that mends it in the row."""
    mend = "mount -t bpf bpf /sys/fs/bpf"
    tool.kernel.checks = (Check("bpffs", False, "not mounted", mend),)
    checked = tool("check")
    assert checked.code == 1
    assert any("MISSING" in line and line.endswith(mend) for line in checked.out.splitlines())
    assert "With mode auto nothing would serve here." in checked.out


def test_check_says_which_mode_would_serve_and_why_no_better_one(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit code 1 only where nothing could serve: a named mode is not made up for by others."""
    supports = {
        "ebpf": Support("ebpf", (Check("BTF", False, "not there", "apt-get install …"),)),
        "nftables": Support("nftables", (Check("nft", True, "1.0.9"),)),
        "iptables": Support("iptables", (Check("xtables", True, "legacy"),)),
    }
    module = importlib.import_module("ebpf_svc.cli.check")
    monkeypatch.setattr(module, "MODES", tuple(supports))
    monkeypatch.setattr(module, "host_checks", lambda settings: ())
    monkeypatch.setattr(
        module, "make_dataplane", lambda mode, settings: Kernel(checks=supports[mode].checks)
    )
    checked = tool("check")
    assert checked.code == 0
    assert checked.out.splitlines()[-3:] == [
        "mode ebpf cannot run: BTF: not there (apt-get install …)",
        "With mode auto, nftables would serve.",
        "Could run, too: iptables.",
    ]
    record = tool("check", "--json").json()
    assert (record["ok"], record["serves"]) == (True, "nftables")
    assert record["modes"]["ebpf"] == {"ok": False, "missing": list(supports["ebpf"].missing)}
    config = tmp_path / "named.yaml"
    config.write_text("mode: ebpf\n")
    assert tool("check", "--config", str(config)).code == 1


def test_cleanup_says_what_it_removed(tool: Tool) -> None:
    """Kernel objects and the run directory are gone, each told."""
    tool.sync()
    cleaned = tool("cleanup")
    assert cleaned.code == 0
    assert "removed 1 map: frontends4" in cleaned.out
    assert not tool.run_dir.exists()


def test_second_cleanup_finds_nothing(tool: Tool) -> None:
    """Without leftovers cleanup is a success, not an error."""
    tool("cleanup")
    again = tool("cleanup")
    assert (again.code, again.out) == (0, "There was nothing to remove.\n")


def test_cleanup_that_fails_says_what_is_left(tool: Tool) -> None:
    """Exit code 1 and the reason; the rest is removed all the same (Z4)."""
    tool.sync()
    tool.kernel.stuck = True
    cleaned = tool("cleanup")
    assert cleaned.code == 1
    assert "mode ebpf: the map is busy" in cleaned.err
    assert "mode ebpf: 1 map: frontends4 still there" in cleaned.err
    assert not tool.run_dir.exists()


def test_cleanup_under_a_running_agent_is_refused(tool: Tool) -> None:
    """Cleaning under a running agent would only make it repair everything."""
    with DirectoryLock(tool.run_dir):
        cleaned = tool("cleanup")
    assert cleaned.code == 1
    assert "stop it" in cleaned.err
    assert tool.kernel.installed


class Agent:
    """A running agent that answers a switch with these steps."""

    def __init__(self, *steps: Progress) -> None:
        self.steps, self.asked = steps, list[SwitchRequest]()

    def ask(self, run_dir: Path, request: SwitchRequest) -> Iterable[Progress]:
        self.asked.append(request)
        return iter(self.steps)


def test_switch_tells_each_step_once_and_what_a_restart_does(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a pipe the seconds of waiting are one line, not hundreds."""
    agent = Agent(
        Progress(Step.OPENING, "iptables"),
        Progress(Step.SERVING, "iptables"),
        Progress(Step.DRAINING, "ebpf", "1 s of at most 9 s"),
        Progress(Step.DRAINING, "ebpf", "2 s of at most 9 s"),
        Progress(Step.DONE, "ebpf", "nothing of it is left"),
    )
    monkeypatch.setattr("ebpf_svc.cli.switch.ask", agent.ask)
    done = tool("switch", "iptables", "--drain-s", "9")
    assert (done.code, done.out.splitlines()) == (
        0,
        [
            "iptables: is opened beside the mode that serves",
            "iptables: serves; connections that are open go on as they are",
            "ebpf: waiting for its connections, 1 s of at most 9 s",
            "ebpf: nothing of it is left",
            "A restart takes the mode of the configuration: set `mode: iptables` to keep it.",
        ],
    )
    assert agent.asked == [SwitchRequest(mode=Mode.IPTABLES, drain_s=9.0)]


def test_switch_that_fails_says_why(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, the reason, and that all is as it was."""
    agent = Agent(Progress(Step.FAILED, "", "mode iptables: no iptables. ebpf goes on as it was"))
    monkeypatch.setattr("ebpf_svc.cli.switch.ask", agent.ask)
    failed = tool("switch", "iptables")
    assert failed.code == 1
    assert failed.err == "ebpf-svc: mode iptables: no iptables. ebpf goes on as it was\n"


def test_switch_without_an_agent_says_how_to_start_one(tool: Tool) -> None:
    """There is nothing to switch."""
    failed = tool("switch", "ebpf")
    assert failed.code == 1
    assert "no agent runs in" in failed.err


def test_run_without_manifests_is_a_usage_error(tool: Tool) -> None:
    """Nothing to serve: told before anything is touched."""
    done = tool("run", "--mode", "fake")
    assert done.code == 2
    assert "manifests" in done.err
    assert not tool.run_dir.exists()


def test_broken_module_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only our own errors become one line; a bug keeps its traceback."""

    def broken(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli.cli, "main", broken)
    with pytest.raises(ZeroDivisionError):
        main(["show"])

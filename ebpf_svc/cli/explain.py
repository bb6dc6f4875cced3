"""`ebpf-svc explain`: what becomes of a packet, step by step, and what the loaded program says."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

import click

from ebpf_svc.cli.output import print_json, print_table
from ebpf_svc.cli.settings import PLACE, settings_from, settings_options
from ebpf_svc.errors import ConfigError, DataplaneError
from ebpf_svc.explain import client as clients
from ebpf_svc.explain import explain as explaining
from ebpf_svc.explain import port, target, words
from ebpf_svc.explain import scene as scenes
from ebpf_svc.explain.explain import Explanation
from ebpf_svc.explain.model import Verdict
from ebpf_svc.explain.way import Way
from ebpf_svc.host.lock import lock_holder
from ebpf_svc.migrate.agent import settings_of_agent
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import family_of
from ebpf_svc.monitor.view import at

DISAGREES = 1
"""Exit code when the program does something else than the model."""
INDENT = 12
LINE = 100
COLOURS = {
    Verdict.FORWARDED: "green",
    Verdict.REFUSED: "yellow",
    Verdict.DROPPED: "red",
    Verdict.UNTOUCHED: "cyan",
    Verdict.OTHER_PORT: "cyan",
}


@click.command(name="explain")
@click.argument("src")
@click.argument("dst", nargs=-1, required=True)
@click.option("--client-port", type=click.IntRange(1, 65535), help="What it is in use for counts.")
@click.option("--sandbox", is_flag=True, help="The socket hooks do not see the client.")
@click.option("--spread", type=click.IntRange(1, 8000), help="Try so many ports; count the ends.")
@click.option("--kernel-only", is_flag=True, help="Ask neither manifests nor the API server.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@settings_options(*PLACE)
@click.pass_context
def command(
    context: click.Context,
    /,
    *,
    src: str,
    dst: tuple[str, ...],
    client_port: int | None,
    sandbox: bool,
    spread: int | None,
    kernel_only: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what becomes of a connection from SRC to DST on this node, and why.

    In mode ebpf the program itself is asked: the very code is run on a packet, with the live maps
    for what is served and maps of its own for flows, so nothing that is alive is touched. What it
    does is compared with what it must do; exit code 1 says that they differ.

    \b
    SRC   an address; namespace/pod; node, localhost or outside
    DST   ADDRESS:PORT, [IPV6]:PORT, with /udp or /sctp behind; or svc NAMESPACE/NAME[:PORT]

    \b
    Example:
      ebpf-svc explain outside 172.18.0.2:30080
      ebpf-svc explain shop/cart-0 svc shop/web:http --spread 1000
      ebpf-svc explain node [fd00:10:96::a]:53/udp --json

    Next: `ebpf-svc monitor` shows what really happens.
    """
    settings = settings_of_agent(settings_from(options))
    scene = scenes.look(settings, pods=[src] if "/" in src else [], kernel_only=kernel_only)
    frontend = target.parse(dst, scene.names)
    family = family_of(frontend.address)
    if family not in settings.families:
        raise ConfigError("DST", got=str(frontend), expected="of a family that is served here")
    client = clients.resolve(src, family, settings, known=scene.known, around=scene.around)
    try:
        told = explaining.explain(
            scene,
            client,
            frontend,
            port=client_port or 0,
            by_packet=sandbox,
            spread=spread or 0,
        )
    except OSError as error:
        raise DataplaneError(f"the program cannot be tried: {error}") from error
    if as_json:
        print_json(record(told))
    else:
        _print(told, frontend, lock_holder(settings.run_dir))
    if told.proof is not None and told.proof.differences:
        context.exit(DISAGREES)


def record(told: Explanation) -> dict[str, Any]:
    """An explanation as `--json` prints it."""
    prediction, proof = told.prediction, told.proof
    backend = told.backend
    return {
        "client": {
            "address": told.client.address,
            "name": told.client.name,
            "class": str(told.client.kind.name).lower(),
            "device": told.client.device.name if told.client.device else None,
        },
        "frontend": str(told.call.frontend),
        "service": told.name if told.view is not None else None,
        "mode": told.scene.mode,
        "at": "socket" if told.call.at_socket else "packet",
        "verdict": prediction.verdict.value,
        "reason": prediction.reason,
        "list": prediction.list_name.value if prediction.list_name else None,
        "candidates": [at(*end) for end in prediction.candidates],
        "chosen_by": prediction.by.value,
        "backend": at(*backend) if backend else None,
        "masquerade": told.masquerades,
        "hairpin": bool(proof and proof.outcome.hairpin),
        "port": _port(told),
        "way": _way(told.way),
        "endpoints": [
            {
                "address": at(row.address, row.port),
                "node": row.node,
                "state": row.state,
                "eligible": row.eligible,
                "why": row.why,
            }
            for row in told.rows
        ],
        "steps": {step.topic: list(step.sentences) for step in words.steps(told)},
        "headers": [header._asdict() for header in words.headers(told)],
        "program": None
        if proof is None
        else {
            "name": proof.program,
            "tag": proof.tag,
            "verdict": proof.outcome.verdict.value,
            "reason": proof.outcome.reason,
            "client": told.call.client[0],
            "seen_as": at(*proof.outcome.seen_as) if proof.outcome.seen_as else None,
            "backend": at(*proof.outcome.backend) if proof.outcome.backend else None,
            "agrees": not proof.differences,
            "differences": proof.differences,
        },
        "spread": _spread(told),
        "summary": words.summary(told),
    }


def _port(told: Explanation) -> dict[str, Any] | None:
    """The client's port, and what the maps know of it."""
    facts, endpoint = told.port, port.endpoint_of(told)
    if facts is None:
        return None
    asked = facts.asked if told.prediction.reason == "own_answer" else None
    return {
        "client": told.call.client[1],
        "seen": port.seen_port(told),
        "in_use": [
            {"called": called, "endpoint": where, "idle_s": idle_s}
            for called, where, idle_s in (port.in_use(facts, endpoint) if endpoint else ())
        ],
        "passed_over": [
            {"port": number, "holder": holder} for number, holder in port.passed_over(told)
        ],
        "answers": asdict(asked) if asked else None,
    }


def _way(way: Way | None) -> dict[str, Any] | None:
    """Past the stack or through it, as the trial showed."""
    if way is None:
        return None
    return asdict(way)


def _spread(told: Explanation) -> dict[str, int]:
    return {
        end if isinstance(end, str) else at(*end): count for end, count in told.spread.most_common()
    }


def _print(told: Explanation, frontend: FrontendKey, agent: int | None) -> None:
    who = told.client.name or told.client.address
    beside = f"agent {agent}" if agent else "no agent runs"
    click.echo(f"{who} -> {frontend} on {told.scene.node} (mode {told.scene.mode}, {beside})")
    click.secho(f"=> {words.summary(told)}", fg=COLOURS[told.prediction.verdict], bold=True)
    click.echo()
    wrong = told.proof is not None and bool(told.proof.differences)
    for step in words.steps(told):
        is_alarm = wrong and step.topic == "program"
        _print_step(step, fg="red" if is_alarm else None)
        if step.topic == "program" and not is_alarm:
            continue
    if told.rows:
        click.echo()
        print_table(
            ("endpoint", "node", "state", "eligible", "why"),
            [
                (
                    at(row.address, row.port),
                    row.node or "-",
                    row.state or "-",
                    "yes" if row.eligible else "no",
                    row.why,
                )
                for row in told.rows
            ],
            styles=("cyan",),
        )
    if told.scene.known.snapshot is None and told.view is not None:
        click.echo(f"Endpoints as the kernel has them: {told.scene.known.why_not}.")
    if headers := words.headers(told):
        click.echo()
        print_table(("packet", "source", "destination"), headers, styles=("cyan",))
    if told.spread:
        _print_spread(told)


def _print_step(step: words.Step, *, fg: str | None) -> None:
    text = "\n".join(step.sentences)
    wrapped = [
        line
        for sentence in text.splitlines()
        for line in textwrap.wrap(sentence, LINE - INDENT, break_on_hyphens=False)
    ]
    head = click.style(step.topic.ljust(INDENT), bold=True)
    for number, line in enumerate(wrapped or [""]):
        click.echo((head if number == 0 else " " * INDENT) + click.style(line, fg=fg))


def _print_spread(told: Explanation) -> None:
    total = told.spread.total()
    click.echo()
    print_table(
        ("of", "went to", "share"),
        [(str(count), end, f"{100 * count / total:.1f} %") for end, count in _spread(told).items()],
    )

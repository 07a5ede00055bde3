# SPDX-License-Identifier: Apache-2.0
"""`shadowc doctor`: what this machine has, and what to type for what it lacks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from shadowc._version import __version__
from shadowc.cli import doctor_checks as checks
from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.cli.doctor_checks import Finding


def doctor(json: flags.AsJson = False) -> None:
    """Check the machine and its memory's pace, Python, packages, ONNX Runtime, the op library, and every target."""
    from shadowc.runtime.hardware import here

    machine = here()
    needed = [checks.python(), *checks.packages(), checks.onnx_runtime()]
    operators, library = checks.op_library()
    stream, bandwidth = checks.stream(machine, library)
    findings = [
        checks.processor(machine, library),
        stream,
        checks.memory(machine),
        checks.gpu(),
        *needed,
        operators,
        *checks.optional(),
        checks.cache(),
        checks.cpu_target([*needed, operators]),
        *map(checks.tensorrt, checks.TENSORRT_TARGETS),
    ]
    if json:
        facts = {**asdict(machine), "isa": library.isa if library else None, "bytes_per_second": bandwidth}
        render.as_json({"shadowc": __version__, "machine": facts, "findings": [asdict(one) for one in findings]})
    else:
        render.facts({finding.name: finding.found for finding in findings}, title=f"shadowc {__version__}")
    for finding in findings:
        if finding.hint:
            render.say(f"{finding.name}: {finding.hint}")
    _require(findings)


def _require(findings: list[Finding]) -> None:
    """Raise SetupError with everything that fails; a target that lacks what failed is no failure of its own."""
    failed = [finding for finding in findings if finding.state == "fails"]
    if failed:
        from shadowc.spec.errors import SetupError

        raise SetupError(
            f"{len(failed)} of {len(findings)} checks failed",
            hint=failed[0].hint,
            problems=[f"{finding.name}: {finding.found}" for finding in failed],
        )

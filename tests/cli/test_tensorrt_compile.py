# SPDX-License-Identifier: Apache-2.0
"""`shadowc compile` and `shadowc doctor` about TensorRT on the command line: refusals, and what is missing here."""

from __future__ import annotations

from pathlib import Path

import pytest

from shadowc.emit.tensorrt import checks
from tests.cli.conftest import Shadowc


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed_bindings", lambda: ((), ("tensorrt: not installed",)))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--max-batch", "8"), "--max-batch has no effect with --target cpu"),
        (("--max-context", "8", "--compute-capability", "8.6"), "--max-context, --compute-capability have no effect"),
        (("--weights", "fp16"), "target cpu has no weights 'fp16', expected one of fp32, bf16, int8, int4"),
        (
            ("--target", "tensorrt-rtx", "--weights", "int4"),
            "tensorrt-rtx has no weights 'int4', expected",
        ),
        (("--target", "tensorrt-rtx", "--exact-prompts"), "--exact-prompts has no effect with --target tensorrt-rtx"),
        (("--target", "tpu"), "expected one of cpu, tensorrt-rtx, tensorrt"),
        (("--target", "tensorrt-rtx", "--compute-capability", "x"), "--compute-capability"),
    ],
)
def test_flags_that_do_not_fit_the_target_are_refused(
    shadowc: Shadowc, tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    result = shadowc("compile", "--model", "opt-mini", "--out", tmp_path / "e", *flags)
    assert result.exit_code in (2, 3), result.output
    assert says in result.stderr
    assert not (tmp_path / "e").exists()


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(("target", "extra"), [("tensorrt-rtx", "rtx"), ("tensorrt", "tensorrt")])
def test_missing_builder_ends_compile_with_what_to_install(
    shadowc: Shadowc, tmp_path: Path, target: str, extra: str
) -> None:
    result = shadowc("compile", "--model", "opt-mini", "--target", target, "--out", tmp_path / "e")
    assert result.exit_code in (2, 6), result.output
    assert f"the builder of target {target}" in result.stderr
    assert f"pip install 'shadowc[{extra}]'" in result.stderr


@pytest.mark.usefixtures("nothing_installed")
def test_doctor_has_one_line_for_each_target_and_does_not_fail_for_want_of_them(shadowc: Shadowc) -> None:
    result = shadowc("doctor")
    assert result.exit_code == 0, result.output
    for target, extra in (("tensorrt-rtx", "rtx"), ("tensorrt", "tensorrt")):
        lines = [line for line in result.stdout.splitlines() if line.split()[:1] == [target]]
        assert len(lines) == 1
        assert "cannot build" in lines[0]
        assert f"{target}: pip install 'shadowc[{extra}]'" in result.output

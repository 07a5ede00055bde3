# SPDX-License-Identifier: Apache-2.0
"""The import contract: what may be loaded before a command runs. Modules are counted, not seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shadowc.cli.app import COMMANDS

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_graphsurgeon", "onnxscript", "numpy", "safetensors")
NOT_FOR_HELP = (*HEAVY, "pydantic", "huggingface_hub", "tokenizers")
NOT_FOR_IMPORT = (*NOT_FOR_HELP, "typer", "rich")
SPEC = ("errors", "density", "ops", "options", "manifest", "program", "progress")


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    report = "import sys; print('modules:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("modules:", 1)[1].split())


def help_of(*arguments: str) -> str:
    return (
        "from shadowc.cli.app import app\n"
        f"try: app({[*arguments, '--help']!r})\n"
        "except SystemExit as end: assert not end.code, end.code"
    )


def test_importing_shadowc_loads_nothing_heavy() -> None:
    assert not loaded_by("import shadowc; shadowc.__version__").intersection(NOT_FOR_IMPORT)


def test_help_loads_nothing_heavy() -> None:
    assert not loaded_by(help_of()).intersection(NOT_FOR_HELP)


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = "\n".join(help_of(command) for command, *_ in COMMANDS)
    assert not loaded_by(code).intersection({*NOT_FOR_HELP} - {"pydantic"})  # typer itself reads flags with it


@pytest.mark.parametrize("module", SPEC)
def test_spec_imports_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import shadowc.spec.{module}").intersection(HEAVY)


def test_a_heavy_import_would_be_noticed() -> None:
    assert "numpy" in loaded_by("import shadowc; import numpy")


def test_unknown_public_name_raises_attribute_error() -> None:
    import shadowc

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = shadowc.nothing

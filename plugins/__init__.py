# SPDX-License-Identifier: Apache-2.0
"""The shadowc operators as machine code: finds the library that ONNX Runtime loads."""

import pathlib

LIBRARY_NAME = "libshadowc_ort.so"


def cpu_library() -> pathlib.Path:
    """Path of the operator library for ONNX Runtime's CPU provider.

    Raises:
        FileNotFoundError: the package was installed without its compiled part.
    """
    path = pathlib.Path(__file__).resolve().parent / LIBRARY_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {LIBRARY_NAME} in {path.parent}, found none: this is a source tree or an incomplete "
            f"install. Install the package with its compiled part: pip install ."
        )
    return path

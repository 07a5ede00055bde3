# SPDX-License-Identifier: Apache-2.0
"""The shadowc operators as machine code: finds the library that ONNX Runtime loads."""

import pathlib

LIBRARY_NAME = "libshadowc_ort.so"


def cpu_library() -> pathlib.Path:
    """Path of the operator library for ONNX Runtime's CPU provider.

    Raises:
        FileNotFoundError: the package was installed without its compiled part.
    """
    # An editable install has two folders: this source, and the one where the build puts libraries.
    folders = [pathlib.Path(folder) for folder in __path__]
    for folder in folders:
        if (folder / LIBRARY_NAME).is_file():
            return folder / LIBRARY_NAME
    places = " or ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"expected {LIBRARY_NAME} in {places}, found none: this is a source tree or an incomplete install. "
        f"Install the package with its compiled part (pip install .), or name the library in SHADOWC_ORT_LIBRARY."
    )

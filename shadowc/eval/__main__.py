# SPDX-License-Identifier: Apache-2.0
"""lm-eval's command line with the model `shadowc` in it: `python -m shadowc.eval run --model shadowc ...`."""

from __future__ import annotations


def main() -> None:
    """Run it.

    Raises:
        SystemExit: lm-eval is not installed, or ended.
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import shadowc.eval.harness  # noqa: F401 - registers the model
    except ImportError as error:
        raise SystemExit(f"lm-eval cannot be imported ({error}): pip install 'shadowc[eval]'") from None
    cli_evaluate()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""shadowc beside other runtimes on the same dummy OPT checkpoint, each in an environment of its own."""

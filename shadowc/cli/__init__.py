# SPDX-License-Identifier: Apache-2.0
"""The command line: every command parses, calls one function and renders its result."""

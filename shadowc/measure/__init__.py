# SPDX-License-Identifier: Apache-2.0
"""What is measured: parity with torch, quality on text, speed against the machine's bandwidth."""

# SPDX-License-Identifier: Apache-2.0
"""One file per runtime: how it takes the checkpoint, and how it generates. Each runs in its own environment."""

# SPDX-License-Identifier: Apache-2.0
"""From the real transformers model to a graph without weights, whose nodes know which module they came from."""

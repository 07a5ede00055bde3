# SPDX-License-Identifier: Apache-2.0
"""From a model's name or folder to its facts and its weights, read one tensor at a time."""

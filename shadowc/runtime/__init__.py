# SPDX-License-Identifier: Apache-2.0
"""An engine folder in use: load and check it, generate, teacher-forced logits, verify."""

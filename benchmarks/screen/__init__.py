# SPDX-License-Identifier: Apache-2.0
"""Criteria x styles x scopes x densities on one's own checkpoint: the comparison of the ShadowLLM paper, causally."""

# SPDX-License-Identifier: Apache-2.0
"""What is learned and how masks are made: criteria, traces, predictor, selection, the masked torch model."""

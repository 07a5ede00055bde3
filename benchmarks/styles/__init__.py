# SPDX-License-Identifier: Apache-2.0
"""What a predictor for every layer costs and brings, beside one for all: bytes, time and quality of both styles."""

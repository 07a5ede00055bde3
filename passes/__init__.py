# SPDX-License-Identifier: Apache-2.0
"""Graph surgery, one pass per file; imported as `shadowc.passes`. The order is in `shadowc/pipeline.py`."""

# SPDX-License-Identifier: Apache-2.0
"""Other ways to hold prompt and decode in TensorRT plans, beside the one that `shadowc compile` chose.

`python -m benchmarks.tensorrt opt-mini` compiles a dummy model and builds each way; it needs `make rtx` and no GPU.
"""

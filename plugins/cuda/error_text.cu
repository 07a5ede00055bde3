// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

const char* shadowc_error_text(int status) {
  switch (status) {
    case SHADOWC_OK:
      return "no error";
    case SHADOWC_BAD_SIZE:
      return "a size is out of range or does not fit the others (see SHADOWC_BAD_SIZE in kernels.h)";
    case SHADOWC_BAD_TYPE:
      return "activations must be F32, F16 or BF16, weights of the same type or I8";
    case SHADOWC_BAD_BATCH:
      return "the batch of the mask or density must be 1 or that of the operator";
    case SHADOWC_BAD_POINTER:
      return "a required pointer is null or not aligned to 16 bytes";
    case SHADOWC_BAD_HEAD:
      return "head_size must be at most 128";
    case SHADOWC_BAD_LAYERS:
      return "at most 64 layers, and as many exempt indices, can be selected from";
    default:
      return status > 0 ? cudaGetErrorString(static_cast<cudaError_t>(status)) : "an unknown status";
  }
}

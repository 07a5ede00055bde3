// SPDX-License-Identifier: Apache-2.0
// Lets the bindings check that their structs are those of kernels.h.
#include <cstddef>

#include "kernels.h"

extern "C" {

// Sizes of the structs and the places of their last members.
void shadowc_emulation_layout(size_t out[8]) {
  const size_t sizes[8] = {
      sizeof(shadowc_mask),      offsetof(shadowc_mask, layer),
      sizeof(shadowc_select),    offsetof(shadowc_select, active),
      sizeof(shadowc_ffn),       offsetof(shadowc_ffn, read),
      sizeof(shadowc_attention), offsetof(shadowc_attention, read),
  };
  for (int i = 0; i < 8; ++i) out[i] = sizes[i];
}
}

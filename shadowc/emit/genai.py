# SPDX-License-Identifier: Apache-2.0
"""genai_config.json: lets stock onnxruntime-genai (C, C++, C#, Java, Python) run the folder as it is.

`past_present_share_buffer` is no choice: the operators take a cache of fixed capacity as past and as present.
onnxruntime-genai looks for a relative `custom_ops_library` in the folder first. See examples/genai.
"""

from __future__ import annotations

from shadowc.spec.manifest import MODEL_FILE, ModelPart


def genai_config(model: ModelPart, library: str) -> dict[str, object]:
    """The content of genai_config.json.

    Args:
        model: sizes and token ids.
        library: file name of the op library inside the folder.
    """
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": model.bos,
            "eos_token_id": model.eos,
            "pad_token_id": model.pad,
            "context_length": model.positions,
            "vocab_size": model.vocab,
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "custom_ops_library": library,
                    "provider_options": [],
                },
                "head_size": model.head_size,
                "hidden_size": model.hidden,
                "num_attention_heads": model.heads,
                "num_hidden_layers": model.layers,
                "num_key_value_heads": model.heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": model.positions,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }

"""A GGUF's metadata as Hugging Face's config.

What llama.cpp has in code, and so not in the file, is filled in here: Gemma 3's pattern of windows, the base of its
sliding layers' RoPE and the scale of its attention.
"""

from typing import Any

from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from headrace.scheduler.errors import ModelSourceError, UnsupportedModelError
from headrace.scheduler.gguf_file import GGUFFile

_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}
_GEMMA3_27B_LAYERS = 62


def gguf_config(file: GGUFFile) -> Any:
    """Raises: UnsupportedModelError, naming what is missing or not supported; ModelSourceError."""
    architecture = file.architecture
    if architecture not in _CONFIGS:
        raise UnsupportedModelError(
            f"{file.path}: architecture {architecture!r} is not supported out of a GGUF; {', '.join(_CONFIGS)} are; "
            "try the model's Hugging Face directory"
        )
    if "model.embed_tokens.weight" not in file.names:
        raise UnsupportedModelError(f"{file.path} has no token embedding")
    num_heads, num_kv_heads = file.head_counts()
    hidden_size = int(file.require(f"{architecture}.embedding_length"))
    fields: dict[str, Any] = {
        "vocab_size": file.num_rows("model.embed_tokens.weight"),
        "hidden_size": hidden_size,
        "intermediate_size": int(file.require(f"{architecture}.feed_forward_length")),
        "num_hidden_layers": int(file.require(f"{architecture}.block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": int(file.arch("attention.key_length", hidden_size // num_heads)),
        "max_position_embeddings": int(file.require(f"{architecture}.context_length")),
        "rms_norm_eps": float(file.require(f"{architecture}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "lm_head.weight" not in file.names,
        "rope_parameters": _rope(file),
    }
    if architecture == "gemma3":
        is_27b = fields["num_hidden_layers"] == _GEMMA3_27B_LAYERS
        local_base = float(file.arch("rope.freq_base_swa", 10000.0))
        fields |= {
            "sliding_window": int(file.require("gemma3.attention.sliding_window")),
            "query_pre_attn_scalar": hidden_size // num_heads if is_27b else fields["head_dim"],
            "rope_parameters": {
                "full_attention": fields["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
            },
        }
    try:
        return _CONFIGS[architecture](**fields)
    except Exception as error:  # a config that contradicts itself fails wherever transformers first looks
        raise ModelSourceError(f"{file.path}: the metadata contradicts itself: {error}") from error


def _rope(file: GGUFFile) -> dict[str, Any]:
    """RoPE's parameters. Raises: UnsupportedModelError for a scaling that is not known to be Hugging Face's."""
    rope = {"rope_type": "default", "rope_theta": float(file.arch("rope.freq_base", 10000.0))}
    scaling, factor = file.arch("rope.scaling.type", "none"), float(file.arch("rope.scaling.factor", 1.0))
    if scaling == "linear" and file.architecture == "gemma3":
        return rope | {"rope_type": "linear", "factor": factor}
    if scaling != "none" or file.arch("rope.scale_linear", 1.0) != 1.0:
        raise UnsupportedModelError(f"{file.path}: rope scaling is not supported")
    return rope

"""A GGUF's metadata as Hugging Face's config.

What llama.cpp has in code, and so not in the file, is filled in here: the scale of Gemma's attention, and the base of
RoPE in Gemma 3's sliding layers. Which layers slide is as the config's own default has it.
"""

from typing import Any

from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from headrace.scheduler.errors import HeadraceError, ModelSourceError, UnsupportedModelError
from headrace.scheduler.gguf_file import GGUFFile

_CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
# Gemma's largest models, which scale attention by another size than the head's: their numbers of layers.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def gguf_config(file: GGUFFile) -> Any:
    """Raises: UnsupportedModelError, naming what is missing or not supported; ModelSourceError."""
    try:
        return _read_config(file)
    except HeadraceError:
        raise
    except Exception as error:  # a config that contradicts itself fails wherever transformers first looks
        raise ModelSourceError(f"{file.path}: the metadata contradicts itself: {error}") from error


def _read_config(file: GGUFFile) -> Any:
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
    num_layers = int(file.require(f"{architecture}.block_count"))
    if num_layers > (num_tensors := len(list(file.names))):  # of which transformers would make lists first
        raise ModelSourceError(f"{file.path}: {num_tensors} tensors cannot be {num_layers} layers")
    fields: dict[str, Any] = {
        "vocab_size": file.num_rows("model.embed_tokens.weight"),
        "hidden_size": hidden_size,
        "intermediate_size": int(file.require(f"{architecture}.feed_forward_length")),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": int(file.arch("attention.key_length", hidden_size // num_heads)),
        "max_position_embeddings": int(file.require(f"{architecture}.context_length")),
        "rms_norm_eps": float(file.require(f"{architecture}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "lm_head.weight" not in file.names,
        "rope_parameters": _rope(file),
    }
    if architecture in _GEMMA_27B_LAYERS:
        is_largest = fields["num_hidden_layers"] == _GEMMA_27B_LAYERS[architecture]
        fields["query_pre_attn_scalar"] = hidden_size // num_heads if is_largest else fields["head_dim"]
        fields["sliding_window"] = int(file.require(f"{architecture}.attention.sliding_window"))
    if architecture == "gemma2":
        fields["attn_logit_softcapping"] = float(file.arch("attn_logit_softcapping", 50.0))
        fields["final_logit_softcapping"] = float(file.arch("final_logit_softcapping", 30.0))
    if architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": float(file.arch("rope.freq_base_swa", 10000.0))}
        fields["rope_parameters"] = {"full_attention": fields["rope_parameters"], "sliding_attention": local}
    if (num_rotated := int(file.arch("rope.dimension_count", fields["head_dim"]))) != fields["head_dim"]:
        raise UnsupportedModelError(f"{file.path}: rotating {num_rotated} of {fields['head_dim']} is not supported")
    return _CONFIGS[architecture](**fields)


def _rope(file: GGUFFile) -> dict[str, Any]:
    """RoPE's parameters. Raises: UnsupportedModelError for a scaling that is not known to be Hugging Face's."""
    rope = {"rope_type": "default", "rope_theta": float(file.arch("rope.freq_base", 10000.0))}
    scaling, factor = file.arch("rope.scaling.type", "none"), float(file.arch("rope.scaling.factor", 1.0))
    if scaling == "linear" and file.architecture == "gemma3":
        return rope | {"rope_type": "linear", "factor": factor}
    if scaling != "none" or file.arch("rope.scale_linear", 1.0) != 1.0:
        raise UnsupportedModelError(f"{file.path}: rope scaling is not supported")
    return rope

"""LoRA adapters as PEFT writes them, and the models that they make once PEFT has merged them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch


def save_adapter(folder: Path, base: Any, seed: int, **fields: Any) -> Any:
    """Write an adapter of random weights for a model into a folder; returns the model with the adapter merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for names that are going
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        options: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False} | fields
        adapted = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.data = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
        adapted.save_pretrained(str(folder))
        return adapted.merge_and_unload().eval()

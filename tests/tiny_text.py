"""Text encoders and tokenizers of random weights, as small as they go; nothing is downloaded."""

from __future__ import annotations

import string
from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 12
_LETTERS = list(string.ascii_lowercase)


def clip_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer for small letters."""
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=8)


def clip(*, projection: int | None = None) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return CLIP's text encoder, perhaps with a projection of its pooled output to so many numbers."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=WIDTH, intermediate_size=8, projection_dim=projection or WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    """Return T5's tokenizer for small letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -2.0) for letter in _LETTERS)], extra_ids=0, model_max_length=8)


def t5(kind: str = "t5") -> T5EncoderModel | UMT5EncoderModel:
    """Return the encoder of T5, or of UMT5 as Wan has it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=30, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return (T5EncoderModel(T5Config(**sizes)) if kind == "t5" else UMT5EncoderModel(UMT5Config(**sizes))).eval()


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Return Qwen's tokenizer for letters, signs and its special tokens."""
    letters = [*string.printable.strip(), "Ġ", "Ċ"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*letters, *special])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=special[1:], model_max_length=512)


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    """Return the language model of Qwen2.5-VL with next to no eyes."""
    torch.manual_seed(0)
    text = dict(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=1024,
        rope_scaling={"mrope_section": [2, 2, 2], "rope_type": "default", "type": "default"},
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=WIDTH)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, bos_token_id=1, eos_token_id=2)
    return Qwen2_5_VLForConditionalGeneration(config).eval()

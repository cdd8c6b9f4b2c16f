"""Tiny decoders of transformers, made from their configurations."""

from __future__ import annotations

import torch
import transformers as hf

WIDTH = 32
NUM_BLOCKS = 3
VOCAB_SIZE = 120

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": WIDTH, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 64}
_WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}

# The class of each family, that of its configuration, and its settings.
_FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _GROUPED),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**_GROUPED, "head_dim": 8}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {**_GPT2, **_WITHOUT_DROPOUT, "bos_token_id": 1, "eos_token_id": 2}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, _GROUPED),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {**_GROUPED, "head_dim": 8}),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, _SIZES),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {**_GROUPED, "num_local_experts": 2}),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, _GROUPED),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config, _SIZES),
    # Its feed-forward layer returns a tuple.
    "gpt_oss": (
        hf.GptOssForCausalLM,
        hf.GptOssConfig,
        {**_GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    # These can't be replaced.
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": WIDTH}),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, {**_SIZES, "n_layer": NUM_BLOCKS, "n_head": 4}),
}
FAMILIES = [name for name in _FAMILIES if name not in ("opt", "bloom")]


def tiny_decoder(family: str, **settings: object) -> hf.PreTrainedModel:
    """Make the same model in every call, in training mode; `attn_implementation` is a setting, too."""
    model_class, config_class, sizes = _FAMILIES[family]
    torch.manual_seed(0)
    return model_class(config_class(**{**sizes, **settings})).train()

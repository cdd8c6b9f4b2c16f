"""Our transformer as Hugging Face's transformers knows models: a wrapper around it, without any of its maths.

What is here: the loop over the blocks with their cache, mask and checkpointing, and what is refused of loaded weights.
Importing this file registers the classes with AutoConfig and AutoModelForCausalLM.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tinyexperts.errors import InputError
from tinyexperts.hub.checked_weights import check_weights
from tinyexperts.hub.configuration import TinyExpertsConfig
from tinyexperts.hub.real_tokens import real_tokens
from tinyexperts.model import Transformer
from tinyexperts.model.attention import Attend, Attention, rotary_angles
from tinyexperts.model.transformer import Block
from tinyexperts.training.config_file import layer_to_content

# For trust_remote_code=True where nobody imports tinyexperts.hub.
_REMOTE_CODE = "from tinyexperts.hub import TinyExpertsConfig, TinyExpertsForCausalLM  # noqa: F401\n"


class TinyExpertsForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of ours for transformers; `model` is the Transformer, whose parameters keep their names.

    In training an `attention_mask` keeps padding out of the feed-forward layers too: batch statistics of queries and
    the choices of mixtures of experts are those of the real tokens.
    """

    config: TinyExpertsConfig
    config_class = TinyExpertsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.head.weight": "model.embedding.weight"}
    # Running statistics, which our own layers keep in fp32 too, whatever the weights are cast to.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        *("router.norm.running_mean", "router.norm.running_var", "feed_forward.threshold")
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": Block}

    def __init__(self, config: TinyExpertsConfig) -> None:
        """Make a model with the initial weights that Transformer draws.

        Args:
            config (TinyExpertsConfig): the settings.
        """
        super().__init__(config)
        self.model = Transformer(config.transformer())
        self._describe_attention()
        self.gradient_checkpointing = False
        self._checkpoint_every = 1
        self.post_init()

    @classmethod
    def of(cls, model: Transformer, **others: Any) -> TinyExpertsForCausalLM:
        """Wrap a trained model, which is not copied.

        Args:
            model (Transformer): the model.
            others (Any): fields of TinyExpertsConfig beside those of the model, such as eos_token_id.
        """
        with torch.device("meta"):
            wrapper = cls(TinyExpertsConfig.of(model.config, **others))
        wrapper.model = model
        wrapper._describe_attention()
        wrapper.train(model.training)
        return wrapper

    def _describe_attention(self) -> None:
        """Give each attention layer what the attention functions of transformers look for."""
        for number, block in enumerate(self.model.blocks):
            attention = block.attention
            described = {
                "layer_idx": number,
                "is_causal": True,
                "num_key_value_groups": attention.num_heads // attention.key_value_heads,
                "config": self.config,
            }
            for name, value in described.items():
                setattr(attention, name, value)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights that the modules drew when they were made; loading refuses to lack any."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load a model, as PreTrainedModel does, but refuse what it would make up.

        Args:
            args (Any): the folder or the repository, as for PreTrainedModel.
            output_loading_info (bool): return (model, loading info).
            options (Any): as for PreTrainedModel, such as dtype and device_map.

        Raises:
            InputError: weights that are missing, unknown, of another shape or not finite, each named.
        """
        model, told = super().from_pretrained(
            *args, output_loading_info=True, **(options | {"ignore_mismatched_sizes": True})
        )
        check_weights(model, told, source=model.name_or_path)
        return (model, told) if output_loading_info else model

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Turn checkpointing on for every n-th block: transformers counts only layers of a class of its own."""
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)
        self._checkpoint_every = every_n_layers

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """Save the model as PreTrainedModel does, as its tables are now, with the code that trust_remote_code imports.

        Args:
            save_directory (str | os.PathLike[str]): the folder.
            args (Any): as for PreTrainedModel.
            options (Any): as for PreTrainedModel, such as max_shard_size.
        """
        self.config.expert_layer = layer_to_content(self.model.config.expert_layer)
        self.config.auto_map = {
            "AutoConfig": "modeling_tinyexperts.TinyExpertsConfig",
            "AutoModelForCausalLM": "modeling_tinyexperts.TinyExpertsForCausalLM",
        }
        super().save_pretrained(save_directory, *args, **options)
        Path(save_directory, "modeling_tinyexperts.py").write_text(_REMOTE_CODE, encoding="utf-8")

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding, whose number of rows is the vocabulary."""
        self.model.embedding = value
        self.model.config = replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    @can_return_tuple
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if there are labels.

        Args:
            input_ids (int64, [B, T]): the tokens; with a cache, those that follow the ones it has seen.
            attention_mask (int64, [B, tokens seen + T]): 0 for padding; or whatever else transformers' functions take.
            position_ids (int64, [B, T]): the positions of the tokens; packed sequences each begin at 0.
            cache (Cache | None): keys and values of the tokens seen so far.
            past_key_values (Cache | None): the same, under the name that transformers had for it before 5.24.
            inputs_embeds (float, [B, T, D]): the embedded tokens, in place of input_ids.
            labels (int64, [B, T]): the tokens again, -100 where there is no loss; they are shifted here.
            use_cache (bool | None): make a cache if none is given; None: as the configuration says.
            logits_to_keep (int | Tensor): the last so many positions, or these; 0: all.
            options (Any): whatever attention functions and losses of transformers take.

        Returns:
            loss (fp32, scalar), logits (float, [B, kept, V]), the cache, and hidden states if asked for.

        Raises:
            InputError: both or none of input_ids and inputs_embeds, two caches, or attentions asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give exactly one of input_ids and inputs_embeds")
        if options.pop("output_attentions", None):
            raise InputError("this model does not return attentions: output_attentions must be False, got True")
        if cache is not None and past_key_values is not None:
            raise InputError("give the cache once, as cache or as past_key_values")
        cache = past_key_values if cache is None else cache
        x = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        attention = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, cache=cache, position_ids=position_ids
        )
        angles = rotary_angles(self.model.config, position_ids.unsqueeze(1))
        real = None
        if self.training and isinstance(attention_mask, Tensor):
            of_tokens = attention_mask[:, -x.shape[1] :] if attention_mask.dim() == 2 else attention_mask
            real = real_tokens(of_tokens, x)
        for number, block in enumerate(self.model.blocks):
            attend = self._attend(block.attention, attention, cache, options)
            if self.gradient_checkpointing and self.training and number % self._checkpoint_every == 0:
                x = self._gradient_checkpointing_func(block.__call__, x, angles, attend, real)
            else:
                x = block(x, angles, attend, real)
        logits = self.model.head(slice_logits_to_keep(self.model.norm(x), logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def _attend(self, module: Attention, mask: Any, cache: Cache | None, options: dict[str, Any]) -> Attend:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            own = dict(options)  # a paged cache writes into it, each layer its own
            if cache is not None:
                key, value = cache.update(key, value, module.layer_idx, kwargs=own)
            y, _ = function(module, query, key, value, mask, dropout=0.0, scaling=module.head_dim**-0.5, **own)
            attended: Tensor = y.transpose(1, 2)
            return attended

        return attend


AutoModelForCausalLM.register(TinyExpertsConfig, TinyExpertsForCausalLM, exist_ok=True)

"""The configuration of our transformer as Hugging Face's transformers keeps it, in config.json."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from tinyexperts.errors import InputError
from tinyexperts.model import TransformerConfig
from tinyexperts.training.config_file import model_from_content, model_to_content

# What transformers itself writes into config.json, or gives to every configuration, and keeps without a field for it.
_OF_TRANSFORMERS = {
    *("model_type", "auto_map", "torch_dtype", "name_or_path", "quantization_config", "num_labels", "per_layer_config"),
    *("attn_implementation", "experts_implementation", "output_attentions", "use_cache"),
}


class TinyExpertsConfig(PreTrainedConfig):
    """A TransformerConfig, field by field, under our names; the names that transformers has for them work too.

    The layers are plain values, as in a run's config.json: `expert_layer` has a `kind`. Without `dense`,
    `expert_layer` and `expert_blocks` the defaults of TransformerConfig are taken.

    Raises:
        InputError: a field that is unknown, or a value that a TransformerConfig refuses.
    """

    model_type = "tinyexperts"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "context_length",
        "tie_word_embeddings": "tied_embeddings",
        "rms_norm_eps": "norm_eps",
    }

    vocab_size: int = 4096
    context_length: int = 256
    d_model: int = 64
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int | None = None
    tied_embeddings: bool = False
    dense: dict[str, Any] | None = None
    expert_layer: dict[str, Any] | None = None
    expert_blocks: list[int] | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **others: Any) -> None:
        unknown = [
            name
            for name in others
            if not name.startswith("_") and name not in _OF_TRANSFORMERS and name not in self.attribute_map
        ]
        if unknown:
            raise InputError(f"a TinyExpertsConfig has no field {', '.join(sorted(unknown))}")
        super().__post_init__(**others)
        content = model_to_content(self.transformer())
        for name in ("dense", "expert_layer"):
            setattr(self, name, content[name])
        if self.num_key_value_heads is None:  # caches of transformers ask for it
            self.num_key_value_heads = self.num_heads

    @classmethod
    def of(cls, config: TransformerConfig, **others: Any) -> TinyExpertsConfig:
        """Return the configuration of a model.

        Args:
            config (TransformerConfig): the model's own configuration.
            others (Any): fields of transformers, such as eos_token_id.
        """
        return cls(**model_to_content(config), **others)

    @property
    def head_dim(self) -> int:
        """The width of an attention head."""
        return self.d_model // self.num_heads

    def transformer(self) -> TransformerConfig:
        """Return the model's own configuration.

        Raises:
            InputError: a value that a TransformerConfig refuses.
        """
        values = {field.name: getattr(self, field.name) for field in fields(TransformerConfig)}
        return model_from_content({name: value for name, value in values.items() if value is not None})


AutoConfig.register(TinyExpertsConfig.model_type, TinyExpertsConfig, exist_ok=True)

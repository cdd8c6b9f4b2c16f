"""A tokenizer of ours as transformers knows tokenizers: the same ids for the same text."""

from __future__ import annotations

import tokenizers
from transformers import PreTrainedTokenizerFast

from tinyexperts.data import Tokenizer

# A base model has no roles: what was said so far, one after the other.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def to_transformers(tokenizer: Tokenizer, *, context_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer for transformers.

    Names of control tokens in a text are text, unless they are ordinary pieces of its vocabulary, and no token is added
    before or after it, as in training. The token that ends a text also begins one, and pads on the left. A chat is the
    contents of its messages.

    Args:
        tokenizer (Tokenizer): the tokenizer.
        context_length (int): the longest sequence of the model, in tokens.
    """
    plain = tokenizers.Tokenizer.from_str(tokenizer.plain_json)
    if plain.num_special_tokens_to_add(False):
        plain.post_processor = None
    end = tokenizer.decode([tokenizer.end_of_text_id])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=context_length,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )

"""Text generation, token by token, with a cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyexperts.errors import InputError, require_at_least
from tinyexperts.model.evaluation_mode import evaluation_mode
from tinyexperts.model.transformer import Cache, Transformer


def generate(
    model: Transformer,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    end_of_text_id: int | None = None,
) -> Tensor:
    """Continue each row of a prompt; the model is in evaluation mode meanwhile.

    Args:
        model (Transformer): the model.
        prompt (int64, [B, T]): T >= 1 tokens.
        max_new_tokens (int): tokens to add at most.
        temperature (float): the divisor of the logits; 0 takes the likeliest token, the first of several such, among
            which the tiniest temperature above 0 draws.
        top_k (int | None): draw among the k likeliest tokens only.
        top_p (float | None): draw among the fewest likeliest tokens whose probabilities reach this sum.
        generator (torch.Generator | None): the source of the draws.
        end_of_text_id (int | None): a row that has drawn this token repeats it, and generation ends when all rows have.

    Returns:
        tokens (int64, [B, T + new]): the prompt and its continuation.

    Raises:
        InputError: an empty prompt, more tokens than the context holds, a setting out of range, logits that are NaN.
    """
    if prompt.dim() != 2 or prompt.shape[1] < 1:
        raise InputError(f"the prompt must be [B, T] with at least one token, got {list(prompt.shape)}")
    require_at_least(1, "max_new_tokens", max_new_tokens)
    if prompt.shape[1] + max_new_tokens > model.config.context_length:
        raise InputError(
            f"a prompt of {prompt.shape[1]} tokens and {max_new_tokens} new ones are more than the model's context of "
            f"{model.config.context_length} tokens holds"
        )
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be at least 0 and finite, got {temperature}")
    require_at_least(1, "top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, got {top_p}")
    is_sharded = hasattr(model, "unshard")  # FSDP2 trains with what it gathers here
    with evaluation_mode(model), torch.inference_mode(not is_sharded), torch.no_grad():
        cache, tokens, step = Cache(model, len(prompt)), prompt, prompt
        ended = torch.zeros(len(prompt), 1, dtype=torch.bool, device=prompt.device)
        for _ in range(max_new_tokens):
            step = _draw(model(step, cache)[:, -1].float(), temperature, top_k, top_p, generator)
            if end_of_text_id is not None:
                step = step.masked_fill(ended, end_of_text_id)
                ended = step == end_of_text_id
            tokens = torch.cat([tokens, step], dim=1)
            if bool(ended.all()):
                break
    return tokens.clone()  # a tensor of inference mode could not be trained on


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw the next token of each row, [B, 1], from logits [B, V]; of equal ones the first is the likelier."""
    largest = logits.amax(-1, keepdim=True)
    if not bool((largest > float("-inf")).all()):
        raise InputError(f"the model's logits must be numbers, got {largest.min().item()} for the likeliest token")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    below = (logits - largest).masked_fill(logits == largest, 0.0)  # inf - inf
    # At most 0, so that a tiny temperature can't overflow; one that fp32 rounds to 0 or inf must not make 0 / 0.
    scaled = torch.where((below == 0) | below.isinf(), below, below / temperature)
    if top_k is not None or top_p is not None:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        ordered = scaled.gather(-1, order)
        if top_k is not None:
            ordered[:, top_k:] = float("-inf")
        if top_p is not None and top_p < 1:
            probabilities = ordered.softmax(-1)
            surplus = probabilities.cumsum(-1) - probabilities >= top_p
            surplus[:, 0] = False  # whatever top_p is rounded to
            ordered = ordered.masked_fill(surplus, float("-inf"))
        scaled = scaled.scatter(-1, order, ordered)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)

"""Models whose `generate` drops its cache when a text has grown, to read all of it again.

Phi's longrope turns all keys of long texts by other frequencies than those of short ones.
"""

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from tappa.errors import CompressionError


def rereads_after(model: PreTrainedModel) -> int | None:
    """Tokens after which the model's own `generate` drops the cache and reads all of them again.

    Phi's longrope turns every key by other frequencies in texts that are longer. None: never.
    """
    plain = GenerationMixin.prepare_inputs_for_generation
    if getattr(type(model), "prepare_inputs_for_generation", plain) is plain:
        return None
    border = getattr(model.config.get_text_config(), "original_max_position_embeddings", None)
    return border if isinstance(border, int) else None


def crosses_border(model: PreTrainedModel, held: int, end: int) -> bool:
    """Whether a text of `held` tokens, all read, is read again before it has `end` tokens."""
    border = rereads_after(model)
    return border is not None and 0 < held <= border < end


def check_border(model: PreTrainedModel, held: int, end: int) -> None:
    """Raise CompressionError if a text of `held` tokens in a cache cannot grow to `end` tokens."""
    if crosses_border(model, held, end):
        raise CompressionError(
            f"{type(model).__name__} reads all tokens again, with other RoPE frequencies, when a "
            f"text grows past {rereads_after(model)}: {held} in the cache cannot become {end} step "
            "by step; model.generate does it"
        )


def reads_anew(
    model: PreTrainedModel, held: int, frozen: bool, ids: Tensor | None, mask: Tensor | None
) -> bool:
    """Whether a forward pass without a cache is `generate` that has dropped one of `held` tokens.

    CompressionError where that cannot be done in its place: the cache is frozen, or `generate` has
    lost the text too, as in older versions of transformers.
    """
    border = rereads_after(model)
    if ids is None or border is None:
        return False
    length = ids.shape[1] if mask is None else mask.shape[1]
    if not held <= border < length:
        return False
    if held and (frozen or ids.shape[1] < length):
        raise CompressionError(
            f"{type(model).__name__} throws its cache away when a text grows past {border} tokens, "
            f"where its RoPE has other frequencies: {held} were in it"
        )
    return True

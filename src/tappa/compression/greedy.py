"""What a model's generation config asks of greedy text, one for each prompt: kept, or left out."""

import warnings
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_ENDS = {"bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens"}
_SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "top_h"}
_SAMPLING |= {"epsilon_cutoff", "eta_cutoff"}
_RESULT = {"return_dict_in_generate", "output_scores", "output_logits", "output_attentions"}
_RESULT |= {"output_hidden_states", "use_cache", "_from_model_config", "transformers_version"}
# how it is computed: drafts that the model checks give the text that it would have written
_RUNNING = {"cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"}
_RUNNING |= {"compile_config", "disable_compile", "continuous_batching_config", "low_memory"}
_DRAFTS = {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "use_mtp"}
_DRAFTS |= {"assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"}
_DRAFTS |= {"prompt_lookup_num_tokens", "max_matching_ngram_size", "target_lookbehind"}
_DRAFTS |= {"assistant_ensemble_weight", "speculation_type"}
_OF_BEAMS = {"early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"}
_SAME_TEXT = _ENDS | _SAMPLING | _RESULT | _RUNNING | _DRAFTS | _OF_BEAMS
# what changes the choice of a token, or ends a text, and works token by token
_KEPT = {"repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size"}
_KEPT |= {"encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias"}
_KEPT |= {"begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length"}
_KEPT |= {"min_new_tokens", "exponential_decay_length_penalty", "remove_invalid_values"}
_KEPT |= {"renormalize_logits", "guidance_scale", "watermarking_config", "stop_strings", "max_time"}
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty"), 1),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale"), 1),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits"), False),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "do_sample"), False),
}


def kept(model: PreTrainedModel) -> list[str]:
    """Names of what the generation config asks for that changes greedy text."""
    return [name for name in _asked(model) if name in _KEPT]


def left_out(model: PreTrainedModel) -> list[str]:
    """Names of what it asks for that greedy text cannot be: beams, several texts for a prompt."""
    return [name for name in _asked(model) if name not in _KEPT | _SAME_TEXT]


def greedy_arguments(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampled: bool = False
) -> dict[str, Any]:
    """Arguments with which `model.generate` does nothing of the config but what is `kept`.

    If text is `sampled` all the same, the config says how.
    """
    asked = _asked(model)
    stay = _KEPT | _ENDS | {"use_cache", "transformers_version"} | (_SAMPLING if sampled else set())
    names = [name for name in asked if name not in stay]
    off = {name: _NEUTRAL.get(name) for name in names if not name.startswith("_")}
    return off | ({"tokenizer": tokenizer} if "stop_strings" in asked else {})


def warn_of_left_out(model: PreTrainedModel) -> None:
    """One warning that names what is left out, if anything is."""
    if names := left_out(model):
        told = f"the model's generation config asks for {', '.join(names)}"
        warnings.warn(f"{told}, which is left out: text is greedy here", stacklevel=3)


def _asked(model: PreTrainedModel) -> list[str]:
    """What a generation config sets, of the names that transformers knows."""
    config, known = model.generation_config, vars(GenerationConfig())
    asked = {} if config is None else config.to_dict()
    return [
        name
        for name, value in asked.items()
        if name in known and value not in (None, False, 0, [], _NEUTRAL.get(name))
    ]

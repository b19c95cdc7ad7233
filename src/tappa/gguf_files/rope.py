"""RoPE as a GGUF file describes it: rope_parameters of a config, and the frequencies to check."""

import math
from typing import Any

from tappa.errors import ModelError
from tappa.gguf_files.header import Header

LOCAL_THETA = {"gemma3": 10000.0}  # of sliding layers, which llama.cpp takes for granted
_THETA = 10000.0  # where the file names none
_FREQS, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = (_FREQS, _SHORT, _LONG)
_EQUAL = 1e-5  # relative: transformers rounds frequencies to float32


def rope_parameters(header: Header, local: bool = False) -> dict[str, Any]:
    """What transformers' `rope_parameters` have to be; `local`: those of sliding layers.

    `rope.scaling.*` become "linear", "yarn" or "longrope", `rope_freqs.weight` (divisors f of the
    frequencies) becomes "llama3" where its formula gives f, else "longrope" with f for both
    lengths. Raises ModelError for scaling that transformers cannot express.
    """
    if local:
        theta = header.get("rope.freq_base_swa") or LOCAL_THETA.get(header.architecture)
        return {"rope_type": "default", "rope_theta": theta or _theta(header)}
    return {"rope_theta": _theta(header), **_scaling(header)}


def frequencies(header: Header, width: int, local: bool = False) -> list[float]:
    """The angles per token of `width` rotated dimensions, by llama.cpp's formulas.

    theta_i = base^(-2i / width), divided by rope_freqs or the short factors; linear scaling divides
    all by its factor, yarn (arXiv:2309.00071, section 3.2) those that turn seldom.
    """
    parameters = rope_parameters(header, local)
    plain = [parameters["rope_theta"] ** (-2 * i / width) for i in range(width // 2)]
    if parameters["rope_type"] == "default":
        return plain
    if parameters["rope_type"] == "linear":
        return [angle / parameters["factor"] for angle in plain]
    if parameters["rope_type"] == "yarn":
        shares = _yarn_shares(parameters, width)
        factor = parameters["factor"]
        return [a / factor * (1 - s) + a * s for a, s in zip(plain, shares, strict=True)]
    divisors = header.numbers(_FREQS if _FREQS in header.tensors else _SHORT)
    _require_length(divisors, width)
    return [angle / divisor for angle, divisor in zip(plain, divisors, strict=True)]


def is_equal(came: list[float], wanted: list[float], tolerance: float = _EQUAL) -> bool:
    """Are two lists of frequencies the same, up to a relative tolerance?"""
    pairs = zip(came, wanted, strict=False)
    return len(came) == len(wanted) and all(math.isclose(*p, rel_tol=tolerance) for p in pairs)


def _theta(header: Header) -> float:
    theta = header.get("rope.freq_base", _THETA)
    if not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise ModelError(f"expected a positive rope.freq_base, got {theta!r}")
    return float(theta)


def _scaling(header: Header) -> dict[str, Any]:
    kind = header.get("rope.scaling.type") or ("linear" if _factor(header) else "none")
    has_freqs, has_factors = _FREQS in header.tensors, _LONG in header.tensors
    if has_freqs + has_factors + (kind in ("linear", "yarn")) > 1:
        raise ModelError(
            f"expected one way of scaling RoPE, got {kind!r} and {TENSORS[has_factors]}"
        )
    if has_factors:
        return _longrope(header)
    if has_freqs:
        return _divided(header)
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn") or not _factor(header):
        known = "none, linear or yarn with a factor"
        raise ModelError(f"expected {known} as rope.scaling.type, got {kind!r}")
    if kind == "linear":
        return {"rope_type": "linear", "factor": _factor(header)}
    return _yarn(header)


def _factor(header: Header) -> float:
    """`rope.scaling.factor`, or `rope.scale_linear`, its older name; 0 where there is none."""
    factor = header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 0.0
    if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
        raise ModelError(f"expected a positive rope.scaling.factor, got {factor!r}")
    return float(factor)


def _yarn(header: Header) -> dict[str, Any]:
    factor = _factor(header)
    if header.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise ModelError("cannot apply rope.scaling.yarn_ext_factor")
    scale = header.get("rope.scaling.attn_factor", 1.0)
    scale *= header.get("rope.scaling.yarn_attn_factor", 1.0)
    scaled = {"attention_factor": scale * (0.1 * math.log(factor) + 1)} if scale != 1 else {}
    whole = {} if header.architecture != "gpt-oss" else {"truncate": False}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original(header),
        "beta_fast": float(header.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(header.get("rope.scaling.yarn_beta_slow", 1.0)),
        **scaled,
        **whole,
    }


def _yarn_shares(parameters: dict[str, Any], width: int) -> list[float]:
    """How much of each frequency stays unscaled: 1 for those that turn often."""
    original, base = parameters["original_max_position_embeddings"], parameters["rope_theta"]

    def dimension(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(parameters["beta_fast"]), dimension(parameters["beta_slow"])
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = [(i - low) / max(0.001, high - low) for i in range(width // 2)]
    return [1 - min(1.0, max(0.0, x)) for x in ramp]


def _longrope(header: Header) -> dict[str, Any]:
    if _SHORT not in header.tensors:
        raise ModelError(f"it has {_LONG}, but no {_SHORT}")
    context, original = header.get("context_length"), _original(header)
    return {
        "rope_type": "longrope",
        "short_factor": header.numbers(_SHORT),
        "long_factor": header.numbers(_LONG),
        "factor": context / original,
        "original_max_position_embeddings": original,
        "attention_factor": float(header.get("rope.scaling.attn_factor", 1.0)),
    }


def _divided(header: Header) -> dict[str, Any]:
    divisors = header.numbers(_FREQS)
    if not all(0 < d < math.inf for d in divisors):
        raise ModelError(f"expected positive numbers in {_FREQS}")
    if all(d == 1 for d in divisors):
        return {"rope_type": "default"}
    if found := _llama3(divisors, _theta(header)):
        return found
    context = header.get("context_length")
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": 1.0,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }


def _llama3(divisors: list[float], theta: float) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling that give these divisors d_i, or None.

    Between its two wavelengths 1 / d = (1 - s) / F + s, where s is linear in the frequency. Two
    such points tell the line, up to a common factor of three parameters: low_freq_factor is 1.
    """
    width, factor = 2 * len(divisors), max(divisors)
    angles = [theta ** (-2 * i / width) for i in range(len(divisors))]
    shares = [(1 / d - 1 / factor) / (1 - 1 / factor) for d in divisors]
    between = [(a, s) for a, s in zip(angles, shares, strict=True) if 1e-4 < s < 1 - 1e-4]
    if factor <= 1 or len(between) < 2:
        return None
    (first, high), (last, low) = between[0], between[-1]
    slope = (high - low) / (first - last)
    offset = high - slope * first
    if offset >= 0:
        return None
    ratio = _rounded(1 - 1 / offset)
    original = round(2 * math.pi * slope * (ratio - 1))
    found = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": ratio,
        "original_max_position_embeddings": original,
    }
    wanted = [a / d for a, d in zip(angles, divisors, strict=True)]
    return found if is_equal(_llama3_angles(angles, found), wanted, 1e-6) else None


def _llama3_angles(angles: list[float], parameters: dict[str, Any]) -> list[float]:
    factor, high = parameters["factor"], parameters["high_freq_factor"]
    turns = [parameters["original_max_position_embeddings"] * a / (2 * math.pi) for a in angles]
    shares = [min(1.0, max(0.0, (t - 1) / (high - 1))) for t in turns]
    return [a * ((1 - s) / factor + s) for a, s in zip(angles, shares, strict=True)]


def _rounded(value: float) -> float:
    """To the next whole number, where the difference is what float32 loses."""
    return float(round(value)) if math.isclose(value, round(value), rel_tol=1e-3) else value


def _original(header: Header) -> int:
    original = header.get("rope.scaling.original_context_length")
    if not isinstance(original, int) or original < 1:
        raise ModelError(f"expected rope.scaling.original_context_length, got {original!r}")
    return original


def _require_length(divisors: list[float], width: int) -> None:
    if len(divisors) != width // 2:
        raise ModelError(f"expected {width // 2} factors of RoPE, got {len(divisors)}")

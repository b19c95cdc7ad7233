"""The errors tappa raises: one line each, saying what was expected and what came."""


class TappaError(Exception):
    """Anything a caller can put right. The command line prints it and exits with code 2."""


class ModelError(TappaError):
    """A model or tokenizer that cannot be loaded, or that tappa cannot analyse."""


class TextError(TappaError):
    """A text that is missing, unreadable, too short, or longer than the model's context."""


class OutputError(TappaError):
    """A file or folder that cannot be written."""


class AnalysisFileError(TappaError):
    """A file that is not an Analysis of the schema this version reads."""


class CaptureError(TappaError):
    """Something in the forward pass that the analysis cannot trust."""


class CompressionError(TappaError):
    """A method, a budget or a use of the compressed cache that cannot work."""


class EvaluationError(TappaError):
    """A task, a suite of tasks or a setting of an evaluation that cannot work."""


class PruningError(TappaError):
    """Layers or heads that cannot be removed, or a calibration that does not fit."""


class MissingExtraError(TappaError):
    """A library that an optional part of tappa needs is not installed."""


class VerificationError(TappaError):
    """A claim, a head or a channel that cannot be verified."""


class NonFiniteError(CaptureError):
    """NaN or infinity in the queries or keys of a layer, or NaN among logits."""


class ReportError(TappaError):
    """What a report should show cannot be read."""


class ClusterError(TappaError):
    """Workers that cannot be had, or a piece of work that failed again and again."""

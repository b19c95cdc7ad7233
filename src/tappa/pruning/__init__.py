"""Removing layers and heads, and saving what is left as a plain checkpoint."""

from tappa.pruning.calibration import Calibration, calibrate, calibrate_on
from tappa.pruning.card import as_json, check_plot, figures_table, layer_rows, model_card, plot
from tappa.pruning.heads import remove_kv_groups, silence_heads
from tappa.pruning.importance import bi_prime, group_importance, head_importance, normalised
from tappa.pruning.layers import layers_removed, remove_layers
from tappa.pruning.measure import Figures, measure, nll_of_windows, perplexity_of
from tappa.pruning.orders import ORDERS, Known, layers_to_remove
from tappa.pruning.plan import Amounts, Plan, apply, plan, prune
from tappa.pruning.pruned import remove_and_save
from tappa.pruning.saving import check_target, save_checkpoint
from tappa.pruning.windows import Windows

__all__ = [
    "ORDERS",
    "Amounts",
    "Calibration",
    "Figures",
    "Known",
    "Plan",
    "Windows",
    "apply",
    "as_json",
    "bi_prime",
    "calibrate",
    "calibrate_on",
    "check_plot",
    "check_target",
    "figures_table",
    "group_importance",
    "head_importance",
    "layer_rows",
    "layers_removed",
    "layers_to_remove",
    "measure",
    "model_card",
    "nll_of_windows",
    "normalised",
    "perplexity_of",
    "plan",
    "plot",
    "prune",
    "remove_and_save",
    "remove_kv_groups",
    "remove_layers",
    "save_checkpoint",
    "silence_heads",
]

"""Why a norm stays: the codes of reports, and what each of them means."""

from __future__ import annotations

REASONS = {
    # What it is
    "own-statistics": "The norm takes its statistics from its own input (LayerNorm, RMSNorm, GroupNorm, InstanceNorm); "
    "`--layernorm` moves the gain and bias of the first two.",
    "training-mode": "The norm was saved in training mode; `--eval` says that the model is meant for inference.",
    "no-running-statistics": "The norm has no running statistics and always normalises with the batch.",
    "statistics-used": "The statistics that the norm computes or updates are used elsewhere.",
    "not-finite": "Its statistics or parameters hold NaN or infinity, or the fold would divide by zero.",
    "no-parameters": "There is no gain or bias to move, or none that could take something in.",
    "unused": "Nothing uses what the norm computes.",
    "taken-out": "The fold of another norm took it out already.",
    # What is around it
    "nonlinear": "A nonlinear operator stands between the norm and the weights.",
    "negative-scale": "Behind a maximum a negative scale would turn it into a minimum.",
    "padding": "Zeros at the border stand between: a shift would not be the same there.",
    "several-consumers": "The value before the norm is used elsewhere too (a skip connection, a second norm).",
    "added-to-data": "The norm's output is added to another computed value, which would have to be scaled as well.",
    "graph-input": "Only an input of the network or a constant comes before the norm.",
    "graph-output": "The value leaves the network, so it must stay what it is.",
    "wrong-axis": "The weights have no axis that belongs to the norm's channels.",
    "mixed-channels": "An operator between mixes or moves the channels.",
    "computed-weight": "The weight, or a parameter of the norm, is computed by the code or from the input.",
    "computed-bias": "The bias is computed from the input.",
    "quantised": "The neighbour is quantised, on a grid that was chosen with the norm in place.",
    "unknown-operator": "An operator stands between of which nothing is known.",
    "unknown-shape": "A shape that the fold needs is not known.",
    "too-large": "The map would have to be spread over too many elements.",
    "too-far": "No weight is near enough.",
    "not-linear-layers": "Others than linear layers take the gain of this LayerNorm.",
    "inside-a-branch": "The norm lies in a graph inside another operator of the program.",
    "in-function": "The norm lies in a local function that cannot be put in the place of its calls.",
    "overwritten": "Its input is overwritten in place where it is still used.",
    "part-of-a-call": "The norm is only a part of what one operator computes.",
    "overflow": "Its folded weights are too large for their element type.",
    # What module code cannot express
    "shared-module": "The module is called several times with the same weights.",
    "shared-weight": "The weight is used at several places of the code.",
    "read-elsewhere": "Other code reads the module's parameters, so it cannot be replaced.",
    "functional-call": "It is a function call in the code of a module.",
    "custom-module": "The module does more than to normalise, or than a stock layer does.",
    "constant-in-code": "A constant that would change is written in the code.",
    "module-code": "In eval mode the module is one multiplication and one addition.",
    "hooks": "Hooks on the module see what it takes and gives.",
}
"""Reason code → what it means. Where module code is in the way, `.pt2` and ONNX files of the same model have no such
bounds."""

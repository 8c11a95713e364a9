"""Which axis of a matrix the inputs of its layer are: the columns, but for some models the rows."""

from __future__ import annotations

from della_dist.errors import InputError
from della_dist.planning.views.layout_rules import OTHER_EXPERTS
from della_dist.planning.views.peft import is_conv1d
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.specs.recipe import Side

#: Of DBRX: the last matrices of all experts of a layer, one below another, the inputs in rows.
_STACKED_IN_ROWS = ".ffn.experts.mlp.w2"


def inputs_are_rows(model: CheckpointIndex, name: str, shape: tuple[int, ...], side: Side) -> bool:
    """Return whether the inputs are the rows of a matrix, or of those of a stack.

    Parameters
    ----------
    model
        Whose config.json tells the type.
    name, shape
        Of the tensor.
    side
        What the configuration says.
    """
    if side != "auto":
        return side == "out"
    if name.endswith(_STACKED_IN_ROWS):
        raise InputError(
            f"{model.location}: {name} has the matrices of all experts of a layer one below "
            "another, each with its inputs in the rows, and `wudi` cannot tell them apart. Merge "
            "with another method."
        )
    config = model.documents.get("config.json", {})
    if is_conv1d(config, name.rpartition(".")[0]):
        return True
    text = config.get("text_config")
    types = (config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None)
    return len(shape) == 3 and any(kind in OTHER_EXPERTS for kind in types)


def is_convolution(name: str) -> bool:
    """Return whether a tensor has the filters of a convolution, as far as its name tells.

    Then three axes are (outputs, inputs, taps), as four are (outputs, inputs, height, width);
    otherwise they are a stack of matrices, such as those of experts.
    """
    return any("conv" in part.lower() for part in name.split(".")[-3:])

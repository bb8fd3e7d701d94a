"""What a model of context must know of its data module: whether times compare, and what an encoder was trained on.

Data modules are known here by ``state_dict`` and ``load_state_dict`` alone.
"""

import json
from collections.abc import Mapping
from copy import copy
from typing import Any


def require_absolute_times(datamodule: Any) -> None:
    """See that a moment of one user is a moment of all.

    Args:
        datamodule: Whose state says so in ``split``, JSON with ``relative_times``; None or one that says nothing
            passes.

    Raises:
        ValueError: If times are relative.
    """
    said = {} if datamodule is None else datamodule.state_dict().get("split")
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except ValueError:  # of a data module that means something else by it
            said = {}
    if isinstance(said, dict) and said.get("relative_times"):
        raise ValueError(
            "context needs absolute times, got data.init_args.relative_times true: where each user's clock begins by "
            "itself, nobody knows what others were doing at that moment"
        )


def check_trained_on(path: str, kept: Mapping[str, Mapping[str, Any]], datamodule: Any) -> bool:
    """See that a checkpoint was trained on what is training here: the same split, coding, normalisers and events.

    What differs is told by the data module's own ``load_state_dict``, called on a copy, which throws away what else it
    takes over, such as a seed.

    Args:
        path: Of the checkpoint, for messages.
        kept: The mappings in it, by key; the state of a data module is the one with all keys of the state here.
        datamodule: That of the fit, None if there is none.

    Returns:
        Whether there was anything to compare.

    Raises:
        ValueError: If the data module refuses the state.
    """
    ours = {} if datamodule is None else datamodule.state_dict()
    theirs = next((one for one in kept.values() if ours and ours.keys() <= one.keys()), None)
    if theirs is None:
        return False
    try:
        copy(datamodule).load_state_dict(dict(theirs))
    except ValueError as error:
        raise ValueError(f"encoder_weights: {path}: {error}") from error
    return True

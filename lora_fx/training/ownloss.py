"""The loss that a model of transformers computes itself, as a function of the logits and labels of some of its rows."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.discovery.gradients import Loss
from lora_fx.models.samples import Sample
from lora_fx.regions.survey import trial_twin

_LABELS = "labels"
_OWN = "the loss is the output's own"
_SAME = 1e-5
"""How far the function may be from the output's loss, relatively: both are computed in float32."""
_OTHERWISE = (AttributeError, KeyError, TypeError, ValueError, RuntimeError)
"""What functions of these names raise that are for something else."""


class ApartError(Exception):
    """Rows of one batch would not give each job what it gets alone; says why."""


def own_loss(model: nn.Module, batch: Sample) -> Loss:
    """Return the loss of an output's logits, by the model's own `loss_function`; the model stays unchanged.

    A twin runs once, in eval mode, to see that this is the output's loss: routers may add to it.

    Raises:
        ApartError: the output's loss is not that, or there is none; from the loss too, of another batch.
    """
    function, labels = getattr(model, "loss_function", None), batch.kwargs.get(_LABELS)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not callable(function) or not isinstance(labels, Tensor) or not isinstance(size, int):
        raise ApartError(_OWN)

    known = inspect.signature(type(model).forward).parameters

    def loss(output: Any, given: Sample) -> Tensor:
        if handed_on := sorted(set(given.kwargs) - set(known)):
            raise ApartError(f"the model may hand {handed_on[0]} on to its loss")
        try:
            value: Tensor = function(logits=output.logits, labels=given.kwargs[_LABELS], vocab_size=size)
        except _OTHERWISE as error:
            raise ApartError(_OWN) from error
        return value

    try:
        with trial_twin(model) as twin, torch.no_grad():
            output = twin.eval()(*batch.args, **batch.kwargs)
            expected, found = float(output.loss), float(loss(output, batch))
    except _OTHERWISE as error:
        raise ApartError(_OWN) from error
    if not math.isclose(expected, found, rel_tol=_SAME):
        raise ApartError(f"{_OWN}, and not that of its logits alone")
    return loss

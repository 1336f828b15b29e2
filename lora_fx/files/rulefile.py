"""draft_rules: a model → the text of a first rule file for it."""

from torch import nn

from lora_fx.discovery.study import observed
from lora_fx.files.adapter.codec import numbers_in_file
from lora_fx.models.layers import model_type, norms_in
from lora_fx.models.samples import samples_for
from lora_fx.planning.draft.text import drafted
from lora_fx.planning.planned import PlannedSite


def draft_rules(model: nn.Module, example_inputs: object = None) -> str:
    """Return the text of a commented rule file for the model; the model stays unchanged.

    The rule that is active adapts all linear layers of the model's blocks and not its head.  Comments tell what
    multiplies in the model, what of it cannot be adapted and why, and what each rule costs: parameters, bytes, FLOPs.
    Alternatives (query and value alone, what PEFT adapts in a model of this type, the head, the embeddings, DoRA, …)
    stand ready as comments.  `plan` and `apply` take the text as a file, or parsed: `yaml.safe_load(text)`.

    Args:
        model: as for `plan`; needs no weights, the meta device will do.
        example_inputs: as for `plan`; shows how raw parameters are used, without which they cannot be adapted.

    Raises:
        RefusedError: nothing in the model can be adapted.
        CaptureError: the model refuses the example inputs.
    """
    seen = observed(model, samples_for(model, example_inputs))

    def stored(planned: PlannedSite) -> int:
        return numbers_in_file(planned, model.get_submodule(planned.site.owner))

    return drafted(seen.inventory, norms_in(model), stored, seen.note, model_type(model))

"""Whether an adapter's directory fits a model, with every reason why not."""

from dataclasses import dataclass

from lora_fx.cli.models.spec import load_model
from lora_fx.errors import MOST_SHOWN, AdapterMismatchError, RefusedError
from lora_fx.files.adapter.restore import compared_values, fitted
from lora_fx.models.samples import samples_for
from lora_fx.text import columns, count, visible

_ASK = "values of the base were not compared (--weights does)"


@dataclass(frozen=True, slots=True)
class Fit:
    """What an adapter and a model have in common, or where they differ."""

    model: str
    """The model's class."""
    sites: int
    """How many sites of the model the adapter changes; 0 where it does not fit."""
    values: int
    """Of how many base weights the values were compared."""
    reasons: tuple[tuple[str, str, str], ...] = ()
    """(name, in the file, in the model) for all that does not fit; nothing is in the file of what is only refused."""

    def __str__(self) -> str:
        """Return one line with the verdict; behind it, each reason."""
        model = visible(self.model)
        if not self.reasons:
            values = f"names, shapes and values of {count(self.values, 'base weight')} are the same"
            told = values if self.values else f"names and shapes are the same; {_ASK}"
            return f"fits {model}: {count(self.sites, 'site')}; {told}"
        shown = [_row(*reason) for reason in self.reasons[:MOST_SHOWN]]
        left = len(self.reasons) - len(shown)
        more = [f"  … and {left:,} more"] if left else []
        headline = f"does not fit {model}: {count(len(self.reasons), 'difference')}"
        return "\n".join([headline, columns(shown), *more])

    def document(self) -> dict[str, object]:
        """Return the verdict as JSON has it."""
        keys = ("name", "in_file", "in_model")
        return {
            "fits": not self.reasons,
            "model": self.model,
            "sites_in_model": self.sites,
            "base_values_compared": self.values,
            "reasons": [dict(zip(keys, reason, strict=True)) for reason in self.reasons],
        }


def _row(name: str, in_file: str, in_model: str) -> tuple[str, ...]:
    return (name, f"file {in_file}", f"model {in_model}") if in_file else (name, in_model)


def fit_of(adapter: str, spec: str, trust: bool, weights: bool) -> Fit:
    """Return whether an adapter's directory fits a model, given as MODEL; with values if `weights`.

    Raises:
        AdapterFileError: the adapter's files are damaged.
        ModelSpecError: there is no such model.
    """
    model, inputs = load_model(spec, weights=weights, trust=trust)
    kind = type(model).__name__
    try:
        files, _, decisions = fitted(adapter, model, samples_for(model, inputs))
    except AdapterMismatchError as error:
        return Fit(kind, 0, 0, error.mismatches or (("adapter", "", str(error)),))
    except RefusedError as error:
        refused = tuple((path, "", f"cannot be adapted: {reason}") for path, reason in error.refusals)
        return Fit(kind, 0, 0, refused or (("model", "", str(error)),))
    return Fit(kind, len(decisions.adapted), compared_values(files, decisions, model))

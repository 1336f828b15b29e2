"""Which folds of a merge go onto codes, and by which inputs these are chosen."""

from collections.abc import Mapping

from lora_fx.errors import MergeError
from lora_fx.files.checkpoint.basefiles import BaseCheckpoint
from lora_fx.files.checkpoint.coded import sampled
from lora_fx.files.checkpoint.codes import CodedWeight
from lora_fx.files.checkpoint.plan import CodeFold, PlainWork, WeightFold, Work
from lora_fx.files.covariances import Covariances
from lora_fx.files.fingerprint import same_values


def onto_codes(
    base: BaseCheckpoint, works: Mapping[str, PlainWork], paths: Mapping[str, str], covariances: Covariances | None
) -> dict[str, Work]:
    """Return the works, those of weights that are held as codes under the key of the tensor with the codes.

    Raises:
        MergeError: covariances are given, and there are none for some of these weights, or no such weights.
    """
    done: dict[str, Work] = {}
    missing: list[tuple[str, str]] = []
    for key, work in works.items():
        coded = base.coded(key)
        if not isinstance(work, WeightFold) or not isinstance(coded, CodedWeight):
            done[key] = work
            continue
        inputs = None if covariances is None else covariances.of(paths[key], coded.columns)
        if isinstance(inputs, str):
            missing.append((key, inputs))
            continue
        done[coded.key] = fold = CodeFold(work, coded, inputs)
        if inputs is not None and inputs.values is not None and not same_values(inputs.values, sampled(fold)):
            missing.append((key, f"is of another base: {paths[key]} has other values here"))
    if covariances is not None:
        _refuse_unfitting(covariances, missing, any(isinstance(work, CodeFold) for work in done.values()))
    return done


def _refuse_unfitting(covariances: Covariances, missing: list[tuple[str, str]], used: bool) -> None:
    file = covariances.file.path
    if missing:
        advice = "write it with the adapters that are merged: lora_fx.input_covariances(tuned, data, path)"
        raise MergeError(f"{file}: does not fit this merge; nothing was written", missing, advice)
    if not used:
        raise MergeError(f"{file}: no adapted weight of this checkpoint is held as codes, which it is to choose")

"""LoRA for any PyTorch model, by rewriting its torch.fx graphs.

`plan` reads and never writes; `apply` writes and never decides; `verify` proves.

Names are loaded on first use: linting rule files and printing help must not import torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_fx import errors as errors
    from lora_fx import passes as passes
    from lora_fx.api import apply as apply
    from lora_fx.api import audit as audit
    from lora_fx.api import deltas as deltas
    from lora_fx.api import diff as diff
    from lora_fx.api import disabled as disabled
    from lora_fx.api import explain as explain
    from lora_fx.api import export as export
    from lora_fx.api import extract as extract
    from lora_fx.api import graph as graph
    from lora_fx.api import inspect as inspect
    from lora_fx.api import load as load
    from lora_fx.api import merge as merge
    from lora_fx.api import merge_checkpoint as merge_checkpoint
    from lora_fx.api import plan as plan
    from lora_fx.api import remove as remove
    from lora_fx.discovery.allocating import allocate as allocate
    from lora_fx.discovery.fromdata import plan_from_data as plan_from_data
    from lora_fx.errors import AdapterFileError as AdapterFileError
    from lora_fx.errors import AdapterMismatchError as AdapterMismatchError
    from lora_fx.errors import CaptureError as CaptureError
    from lora_fx.errors import ExportError as ExportError
    from lora_fx.errors import InvariantError as InvariantError
    from lora_fx.errors import LoraFxError as LoraFxError
    from lora_fx.errors import LoraFxWarning as LoraFxWarning
    from lora_fx.errors import MergeError as MergeError
    from lora_fx.errors import NoMatchError as NoMatchError
    from lora_fx.errors import RefusedError as RefusedError
    from lora_fx.errors import RuleError as RuleError
    from lora_fx.errors import StalePlanError as StalePlanError
    from lora_fx.exporters import Exported as Exported
    from lora_fx.files.adapter.adding import add as add
    from lora_fx.files.adapter.swapping import swap as swap
    from lora_fx.files.adapter.write import save as save
    from lora_fx.files.checkpoint.report import MergedTensor as MergedTensor
    from lora_fx.files.checkpoint.report import MergeReport as MergeReport
    from lora_fx.files.covariances import input_covariances as input_covariances
    from lora_fx.files.rulefile import draft_rules as draft_rules
    from lora_fx.graphdiff.deltas.audit import Audit as Audit
    from lora_fx.graphdiff.deltas.audit import AuditedSite as AuditedSite
    from lora_fx.graphdiff.deltas.measure import Deltas as Deltas
    from lora_fx.graphdiff.diff import GraphDiff as GraphDiff
    from lora_fx.graphdiff.graphs import Graph as Graph
    from lora_fx.integrations.frompeft import from_peft as from_peft
    from lora_fx.integrations.peftrules import rules_from_peft as rules_from_peft
    from lora_fx.integrations.topeft import to_peft as to_peft
    from lora_fx.meshes.counting import budget as budget
    from lora_fx.models.samples import call as call
    from lora_fx.planning.allocation import AllocatedSite as AllocatedSite
    from lora_fx.planning.allocation import Allocation as Allocation
    from lora_fx.planning.budget import Budget as Budget
    from lora_fx.planning.budget import Mesh as Mesh
    from lora_fx.planning.budget import StepCost as StepCost
    from lora_fx.planning.plan import Plan as Plan
    from lora_fx.planning.planned import PlannedSite as PlannedSite
    from lora_fx.planning.recipes import RateProbe as RateProbe
    from lora_fx.planning.recipes import Recipe as Recipe
    from lora_fx.planning.recipes import RecipeChoice as RecipeChoice
    from lora_fx.progress.steps import Progress as Progress
    from lora_fx.remerging.graph import Remerge as Remerge
    from lora_fx.remerging.whole import RemergeResult as RemergeResult
    from lora_fx.remerging.whole import remerge as remerge
    from lora_fx.remerging.whole import remerged as remerged
    from lora_fx.rules.ruleset import LoRAConfig as LoRAConfig
    from lora_fx.rules.ruleset import RuleSet as RuleSet
    from lora_fx.training.history import RecordedSite as RecordedSite
    from lora_fx.training.history import RecordedStep as RecordedStep
    from lora_fx.training.prefix import PrefixCache as PrefixCache
    from lora_fx.training.prefix import cached_prefix as cached_prefix
    from lora_fx.training.recipe import recipe as recipe
    from lora_fx.training.record import TrainingRecord as TrainingRecord
    from lora_fx.training.record import read_record as read_record
    from lora_fx.training.recorder import Recorder as Recorder
    from lora_fx.tuned.combining import combine as combine
    from lora_fx.tuned.extract import ExtractReport as ExtractReport
    from lora_fx.tuned.extract import extracted as extracted
    from lora_fx.tuned.listing import AdapterList as AdapterList
    from lora_fx.tuned.listing import ListedAdapter as ListedAdapter
    from lora_fx.tuned.listing import list_adapters as list_adapters
    from lora_fx.tuned.ongrid import OnGrid as OnGrid
    from lora_fx.tuned.ongrid import merged_on_grid as merged_on_grid
    from lora_fx.tuned.optimizing import param_groups as param_groups
    from lora_fx.tuned.optimizing import parameters as parameters
    from lora_fx.tuned.report import PrefixReport as PrefixReport
    from lora_fx.tuned.report import Report as Report
    from lora_fx.tuned.report import print_trainable as print_trainable
    from lora_fx.tuned.requantise import merged_and_requantised as merged_and_requantised
    from lora_fx.tuned.rows import rows as rows
    from lora_fx.tuned.several import drop as drop
    from lora_fx.tuned.several import rename as rename
    from lora_fx.tuned.state import adapter_state as adapter_state
    from lora_fx.tuned.state import load_adapter_state as load_adapter_state
    from lora_fx.tuned.switching import use as use

_HOMES = {
    "lora_fx.api": (
        "apply audit deltas diff disabled explain export extract graph inspect load merge merge_checkpoint plan remove"
    ),
    "lora_fx.files.adapter.adding": "add",
    "lora_fx.discovery.allocating": "allocate",
    "lora_fx.discovery.fromdata": "plan_from_data",
    "lora_fx.files.adapter.swapping": "swap",
    "lora_fx.files.adapter.write": "save",
    "lora_fx.files.checkpoint.report": "MergeReport MergedTensor",
    "lora_fx.files.covariances": "input_covariances",
    "lora_fx.files.rulefile": "draft_rules",
    "lora_fx.errors": (
        "AdapterFileError AdapterMismatchError CaptureError ExportError InvariantError LoraFxError LoraFxWarning "
        "MergeError NoMatchError RefusedError RuleError StalePlanError"
    ),
    "lora_fx.exporters": "Exported",
    "lora_fx.graphdiff.diff": "GraphDiff",
    "lora_fx.graphdiff.graphs": "Graph",
    "lora_fx.graphdiff.deltas.audit": "Audit AuditedSite",
    "lora_fx.graphdiff.deltas.measure": "Deltas",
    "lora_fx.integrations.frompeft": "from_peft",
    "lora_fx.integrations.topeft": "to_peft",
    "lora_fx.integrations.peftrules": "rules_from_peft",
    "lora_fx.planning.allocation": "AllocatedSite Allocation",
    "lora_fx.meshes.counting": "budget",
    "lora_fx.planning.budget": "Budget Mesh StepCost",
    "lora_fx.planning.plan": "Plan",
    "lora_fx.planning.planned": "PlannedSite",
    "lora_fx.planning.recipes": "RateProbe Recipe RecipeChoice",
    "lora_fx.progress.steps": "Progress",
    "lora_fx.remerging.graph": "Remerge",
    "lora_fx.remerging.whole": "RemergeResult remerge remerged",
    "lora_fx.training.history": "RecordedSite RecordedStep",
    "lora_fx.training.prefix": "PrefixCache cached_prefix",
    "lora_fx.training.recipe": "recipe",
    "lora_fx.training.record": "TrainingRecord read_record",
    "lora_fx.training.recorder": "Recorder",
    "lora_fx.tuned.combining": "combine",
    "lora_fx.tuned.extract": "ExtractReport extracted",
    "lora_fx.tuned.listing": "AdapterList ListedAdapter list_adapters",
    "lora_fx.tuned.optimizing": "param_groups parameters",
    "lora_fx.tuned.report": "PrefixReport Report print_trainable",
    "lora_fx.tuned.rows": "rows",
    "lora_fx.tuned.several": "drop rename",
    "lora_fx.tuned.switching": "use",
    "lora_fx.tuned.state": "adapter_state load_adapter_state",
    "lora_fx.tuned.ongrid": "OnGrid merged_on_grid",
    "lora_fx.tuned.requantise": "merged_and_requantised",
    "lora_fx.rules.ruleset": "LoRAConfig RuleSet",
    "lora_fx.models.samples": "call",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name in ("errors", "passes"):
        return importlib.import_module(f"lora_fx.{name}")
    words = importlib.import_module("lora_fx.rules.peftwords").NAMES
    there = f"; {words[name]} does that" if name in words else ""
    raise AttributeError(f"module 'lora_fx' has no attribute {name!r}{there}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

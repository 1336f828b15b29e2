"""What current evidence says for a task: sites, rank, alpha and learning rate, each with its source.  No torch here."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_fx.errors import RefusedError
from lora_fx.planning.decide import decide
from lora_fx.planning.draft.choices import Ground, Offer, active, fitted
from lora_fx.planning.planned import Inventory
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import LoRAConfig, RuleSet
from lora_fx.rules.writing import Written, rule_file
from lora_fx.text import columns, count, nearest, thousands

FACTOR = 10
"""Of the learning rate over that of full fine-tuning."""
_REGRET = "Schulman et al. 2025, LoRA Without Regret, doi:10.64434/tml.20250929"
_TRL = "TRL, trl/scripts"
_DIFFUSERS = "diffusers, docs/training/lora and text2image"
_HEADS = ("classifier", "score", "head", "heads", "fc", "out_head", "qa_outputs")
"""Names of heads of classifiers in transformers, timm and torchvision."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is known of a task."""

    about: str
    full_lr: float
    """The usual learning rate of full fine-tuning with Adam."""
    rate_source: str
    r: int
    rank_why: str
    rank_source: str
    alpha: float = 32
    attention: bool = False
    """Whether the attention alone is adapted."""
    head: bool = False
    """Whether a new head is trained whole."""


TASKS: dict[str, Task] = {
    "instruction": Task(
        "supervised fine-tuning on instructions and answers",
        2e-5,
        f"{_TRL}/sft.py: 2e-5 full, 2e-4 LoRA",
        32,
        "enough for small and middling sets of data; more where they are larger than the adapter",
        f"{_TRL}/sft.py; Tinker, LoRA primer",
    ),
    "preference": Task(
        "pairs of a better and a worse answer (DPO)",
        5e-7,
        f"{_TRL}/dpo.py: 5e-7 full, 5e-6 LoRA",
        32,
        "as usual",
        f"{_TRL}/dpo.py",
    ),
    "reinforcement": Task(
        "policy gradients (GRPO, PPO)",
        1e-6,
        "TRL, docs/lora_without_regret: 1e-6 full, 1e-5 LoRA",
        8,
        "1 to 32 is enough: an episode teaches about one bit",
        _REGRET,
    ),
    "classification": Task(
        "an encoder with a new head",
        2e-5,
        "Devlin et al. 2018, arXiv:1810.04805, A.3: 2e-5 to 5e-5 full",
        8,
        "as in the paper's experiments on GLUE",
        "Hu et al. 2021, arXiv:2106.09685, D.1",
        head=True,
    ),
    "text-to-image": Task(
        "a diffusion model on images with captions",
        1e-5,
        f"{_DIFFUSERS}: 1e-5 full, 1e-4 LoRA",
        4,
        "as diffusers' script",
        _DIFFUSERS,
        alpha=4,
        attention=True,
    ),
}
NOT_FOR = {
    "pretraining": "on billions of tokens LoRA learns less than full fine-tuning, at any rank tried (arXiv:2405.09673)",
}
"""Tasks for which there is no recipe, and why."""


@dataclass(frozen=True, slots=True)
class RecipeChoice:
    """One setting of a recipe: its value, why, and where that comes from."""

    name: str
    value: str
    why: str
    source: str


@dataclass(frozen=True, slots=True)
class RateProbe:
    """What learning rates came to on data: each trained an adapter from the same first values on the same batches."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Mean loss on the batches held out, after training; NaN where a job diverged."""
    before: float
    """The same before training."""
    steps: int
    held_out: int
    how: str
    """"in one batch", or one job after the other and why."""

    @property
    def best(self) -> float:
        """The rate with the lowest loss."""
        return min((loss, rate) for rate, loss in zip(self.rates, self.losses, strict=True) if math.isfinite(loss))[1]

    def __str__(self) -> str:
        told = [
            (f"{rate:.2g}", f"{loss:.4f}" if math.isfinite(loss) else "diverged", "best" if rate == self.best else "")
            for rate, loss in zip(self.rates, self.losses, strict=True)
        ]
        held = f"{self.held_out} batch{'es' if self.held_out > 1 else ''} held out, {self.before:.4f} before"
        head = f"{count(len(self.rates), 'rate')}, {count(self.steps, 'step')} each, {self.how}; loss on {held}"
        is_edge = self.best in (min(self.rates), max(self.rates))
        edge = "  the best is the lowest or highest: probe further" if is_edge else ""
        return "\n".join(filter(None, (head, columns([("rate", "loss", ""), *told]), edge)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules and a learning rate for a task, and why: `plan` and `apply` take `rules`, an optimizer `lr`."""

    task: str
    model: str
    rules: RuleSet
    lr: float
    choices: tuple[RecipeChoice, ...]
    probe: RateProbe | None = field(default=None)

    def __str__(self) -> str:
        wide = max(len(one.name) for one in self.choices)
        lines = [f"{self.model} · recipe for {self.task}: {TASKS[self.task].about}"]
        for one in self.choices:
            lines += [f"  {one.name:{wide}}  {one.value}: {one.why}", f"  {'':{wide}}  [{one.source}]"]
        return "\n".join([*lines, *(["", str(self.probe)] if self.probe is not None else [])])

    def to_yaml(self) -> str:
        """Return the text of a rule file with the rules; what the recipe says stands in it as remarks."""
        return rule_file(self.rules.short_dict(), str(self))

    def probed(self, probe: RateProbe) -> "Recipe":
        """Return the recipe with the rate that was best on data."""
        lowest = min(loss for loss in probe.losses if math.isfinite(loss))
        why = f"lowest loss of {len(probe.rates)} rates on the data held out, {lowest:.4f}"
        rate = RecipeChoice("lr", f"{probe.best:.2g}", why, "probed")
        choices = tuple(rate if one.name == "lr" else one for one in self.choices)
        return replace(self, lr=probe.best, choices=choices, probe=probe)


def check_task(task: object) -> Task:
    """Return what is known of a task.

    Raises:
        RefusedError: nothing, or that LoRA is not for it.
    """
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]
    if isinstance(task, str) and task in NOT_FOR:
        raise RefusedError(f"there is no recipe for '{task}'", [("why", NOT_FOR[task])])
    near = nearest(task, TASKS, 1) if isinstance(task, str) else ()
    facts = [(name, known.about) for name, known in TASKS.items()]
    advice = f"did you mean '{near[0]}'?" if near else "take one of these"
    raise RefusedError(f"there is no recipe for {task!r:.60}", facts, advice)


def recipe_for(inventory: Inventory, task: str, full_lr: float | None = None) -> Recipe:
    """Return the recipe for a model.

    Args:
        inventory: of the model.
        task: one of `TASKS`.
        full_lr: the rate by which full fine-tuning of this model is known to go well; None: the task's usual one.

    Raises:
        RefusedError: there is no such task, or the model has no sites or no head for it.
    """
    known = check_task(task)
    ground = Ground(inventory)
    offer = _attention(ground, known) if known.attention else active(ground, LoRAConfig(known.r, known.alpha))
    if offer is None:
        what = "no attention that can be adapted" if known.attention else "nothing that can be adapted"
        raise RefusedError(f"{inventory.model} has {what}", [(one.site.path, one.role) for one in ground.found])
    r = _rank(offer.rules[0])
    document: dict[str, object] = {"rules": [{**offer.rules[0], "lora": {"r": r, "alpha": known.alpha}}]}
    heads = _heads(inventory) if known.head else ()
    if known.head:
        document["train"] = [*heads]
    rules = replace(read_rules(document), source=f"recipe {task}")
    lr = float(f"{FACTOR * (known.full_lr if full_lr is None else full_lr):.12g}")  # 1e-05, not 9.999999999999999e-06
    parameters = sum(site.trainable for site in decide(rules, inventory).adapted)
    choices = (
        _sites(offer, known),
        RecipeChoice("r", str(r), _rank_why(known, r, parameters), known.rank_source),
        *_rest(known, offer, heads),
        RecipeChoice("lr", f"{lr:.2g}", *_rate_why(known, full_lr)),
    )
    return Recipe(task, inventory.model, rules, lr, choices)


def _attention(ground: Ground, known: Task) -> Offer | None:
    chosen = [one for one in ground.usable if one.role == "attention"]
    lora = LoRAConfig(known.r, known.alpha)
    return ground.choice("attention", "All projections of the attention.", chosen, fitted(chosen, lora))


def _rank(rule: Mapping[str, Written]) -> int:
    lora = rule["lora"]
    assert isinstance(lora, Mapping)
    r = lora["r"]
    assert isinstance(r, int)
    return r


def _heads(inventory: Inventory) -> tuple[str, ...]:
    """Return the paths of modules called like heads, outside of numbered blocks and of each other."""
    found = [
        path
        for path, size in inventory.modules
        if size and path.rpartition(".")[2] in _HEADS and not any(part.isdecimal() for part in path.split("."))
    ]
    heads = tuple(path for path in found if not any(path.startswith(f"{other}.") for other in found))
    if not heads:
        facts = [("known names", ", ".join(_HEADS))]
        raise RefusedError(
            f"{inventory.model} has no head that is known by its name",
            facts,
            "take another task, and name the head under `train:`",
        )
    return heads


def _sites(offer: Offer, known: Task) -> RecipeChoice:
    number = count(len(offer.sites), "site")
    if known.attention:
        return RecipeChoice("sites", f"{offer.rules[0]['name']}, {number}", "what diffusers' script adapts", _DIFFUSERS)
    why = "attention alone learns less, with as many parameters too"
    return RecipeChoice("sites", f"{offer.rules[0]['name']}, {number}", why, f"{_REGRET}; arXiv:2305.14314, 2405.09673")


def _rank_why(known: Task, r: int, parameters: int) -> str:
    why = known.rank_why if r == known.r else f"{known.r} is above the width of most layers; {known.rank_why}"
    return f"{why}; {thousands(parameters)} parameters hold about as many trained tokens"


def _rest(known: Task, offer: Offer, heads: Sequence[str]) -> Iterator[RecipeChoice]:
    scaled = "with alpha / r the best rate hardly depends on the rank"
    yield RecipeChoice("alpha", f"{known.alpha:g}", scaled, _DIFFUSERS if known.attention else _REGRET)
    if any(one.role == "experts" for one in offer.sites):
        why = "there each expert has the rank divided by the number of active experts: divide it in the rules"
        yield RecipeChoice("experts", "as all", why, _REGRET)
    yield RecipeChoice(
        "init", "kaiming", "once the rate is tuned, nine variants are within 1 to 2 % of it", "arXiv:2602.04998"
    )
    if heads:
        yield RecipeChoice("train", ", ".join(heads), "a new head starts at nothing", "PEFT, TaskType.SEQ_CLS")
    if not known.attention:
        yield RecipeChoice("batch", "below 32", "LoRA loses more by large batches than full fine-tuning", _REGRET)


def _rate_why(known: Task, full_lr: float | None) -> tuple[str, str]:
    of = (
        f"{known.full_lr:g}, the usual rate of full fine-tuning" if full_lr is None else f"{full_lr:g}, which was given"
    )
    source = f"{_REGRET}; Tinker, hyperparam_utils" + (f"; {known.rate_source}" if full_lr is None else "")
    return f"{FACTOR} times {of}; about 15 times in runs below 100 steps", source

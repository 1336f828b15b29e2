"""What `bench` returns: as a table, as JSON, as a page with pictures."""

from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass

from lora_fx.bench.counters import Counts
from lora_fx.bench.facts import MachineFacts, Setting
from lora_fx.bench.subjects import LB, OURS, PEFT
from lora_fx.bench.timing import Timing
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.text import columns, count, json_text, scaled

HEADS = ("FLOPs", "saved", "peak", "aten calls")
TIME_HEADS = ("time [95 %]", "min/min", "processor")


@dataclass(frozen=True, slots=True, repr=False)
class BenchReport(InNotebook):
    """What `bench` returns: what a step costs, by subject; all ratios are to the lower bound LB."""

    setting: Setting
    machine: MachineFacts
    counts: dict[str, Counts]
    timing: Timing | None
    """None where nothing was timed."""
    parity: float | None
    """Largest difference between lora_fx and PEFT, over the largest value; None without PEFT."""

    @property
    def void(self) -> str:
        """Why the times say nothing; empty if they do, or there are none."""
        return self.timing.void if self.timing is not None else ""

    def relative(self, name: str) -> tuple[float, ...]:
        """Return FLOPs, saved bytes, peak bytes and operator calls of a subject over those of LB."""
        return tuple(map(_over, astuple(self.counts[name]), astuple(self.counts[LB])))

    @property
    def excess_removed(self) -> float | None:
        """Share of PEFT's time above LB that lora_fx saves; None where that time is not above the noise.

        It is where even the low end of PEFT's interval is further above LB than the interval is wide.
        """
        if self.timing is None or PEFT not in self.timing.ratios:
            return None
        theirs, ours = (self.timing.ratios[name] for name in (PEFT, OURS))
        if theirs.low - 1 <= theirs.high - theirs.low:
            return None
        return (theirs.ratio - ours.ratio) / (theirs.ratio - 1)

    def __str__(self) -> str:
        rows = [("", *(TIME_HEADS if self.timing is not None else ()), *HEADS)]
        rows += [(name, *self._cells(name)) for name in self.counts]
        return "\n".join([self._heading(), "", columns(rows), "", *(f"  {line}" for line in self.remarks())])

    def _heading(self) -> str:
        setting, machine = self.setting, self.machine
        tokens = [] if setting.tokens is None else [count(setting.tokens, "token")]
        sites = f"{count(setting.sites, 'site')}, {setting.in_graphs} in graphs"
        threads = count(machine.threads, "thread")
        return " · ".join([setting.model, setting.rules, sites, *tokens, setting.dtype, machine.device, threads])

    def _cells(self, name: str) -> Iterator[str]:
        """Yield what a row shows: ratios to LB, and in LB's own row what they are ratios to."""
        if self.timing is not None:
            ratio = self.timing.ratios[name]
            own = (_time_text(ratio.seconds), "", "")
            yield from own if name == LB else (ratio.text(), f"{ratio.least:.3f}", f"{ratio.processor:.3f}")
        if name == LB:
            first = self.counts[LB]
            yield from (scaled(first.flops, "FLOP"), scaled(first.saved_bytes, "B"), scaled(first.peak_bytes, "B"))
            yield str(first.aten_calls)
        else:
            yield from (f"{ratio:.3f}" for ratio in self.relative(name))

    def remarks(self) -> Iterator[str]:
        """Yield what stands under the table: what LB is, the control, what was left out, parity, notes."""
        yield "LB: the frozen base with the gradient of its input; the rows below it are multiples of it"
        if self.timing is not None:
            left_out = f"{self.timing.discarded} of {count(self.timing.rounds, 'round')} disturbed and left out"
            yield f"A/A control {self.timing.control.text()}; {left_out}"
            if self.timing.void:
                yield f"VOID: {self.timing.void}"
        if self.excess_removed is not None:
            yield f"of the time that PEFT takes above LB, lora_fx takes {100 * (1 - self.excess_removed):.0f} %"
        if self.parity is not None:
            yield f"outputs and gradients of lora_fx and PEFT differ by {self.parity:.1e} of the largest value"
        yield from (f"note: {note}" for note in self.setting.notes)

    def to_json(self) -> str:
        """Return the report as JSON: all numbers, and the machine that they were measured on."""
        return json_text(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, object]:
        """Return what `to_json` writes."""
        timing = None if self.timing is None else asdict(self.timing) | {"excess_removed": self.excess_removed}
        ratios = timing.pop("ratios") if timing is not None else dict.fromkeys(self.counts)
        subjects = [{"name": k, "counts": asdict(counts), "time": ratios[k]} for k, counts in self.counts.items()]
        return {
            "schema_version": 1,
            "setting": asdict(self.setting),
            "machine": asdict(self.machine),
            "subjects": subjects,
            "timing": timing,
            "parity": self.parity,
        }


def _over(number: int, first: int) -> float:
    """Return the ratio; of nothing to nothing it is 1."""
    return number / first if first else 1.0 if not number else float("inf")


def _time_text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"

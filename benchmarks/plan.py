"""The plan of one GPU run: which steps, in which order, until when.

Times are those of a run of 9.5 minutes; other lengths stretch or shrink them. A step that is done early gives what is
left to those behind it, one that is not done is cut off at its end: nothing that comes later pays for it.

| until | step | what |
|---|---|---|
| 0:20 | device | facts and ceilings; Triton's cache begins to be warmed in the background |
| 1:10 | smoke | every op, forward and backward, small, against float64 |
| 2:40 | checks | every op and the whole model at full size |
| 4:40 | kernels | one process: attention, the model's products, epilogues, norms, log-mel, patches |
| 6:10 | tune | the best guesses among the configurations that are not committed |
| 7:50 | models | inference, then a training step, at 64 clips |
| 8:40 | proofs | the same bits over 50 runs, graphs, races |
| 9:20 | ptxas | the smoke again by the machine's own assembler, then memcheck |
| 9:30 | | the summary |
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import jobs, tune_jobs
from .case import Settings, listed

MINUTES = 9.5  # of the times below
CHECK_SLOTS = 12
_PROOF_SLOTS = 4
_OWN_PTXAS = Path("/usr/local/cuda/bin/ptxas")
# peers that take longer to start than the plan can give them
_SLOW_PEERS = (
    *("torchaudio", "kaldi-native-fbank", "loop", "sdpa-math", "timm", "transformers-eager"),
    *("openvino*", "onnxruntime*", "original", "soundfile*", "less memory", "autocast"),
)
# "median of ten" of one kernel, and a few rounds of a whole model
_KERNEL_LIMITS = {"seconds": 0.2, "min_rounds": 10, "max_rounds": 10, "sample_ms": 3.0}
_MODEL_LIMITS = {"seconds": 1.5, "min_rounds": 5, "max_rounds": 10, "sample_ms": 5.0}
# a little more than the step has: those before it may be done early
_TUNE_S = 105
_KERNEL_S, _MODEL_S, _CHECK_S, _SMOKE_S = 30, 55, 60, 40

# what one process times, most important first; `{d}` is the leading dtype
KERNELS = (
    *(f"attention/attention {mode} B64 T1214 H12 D64 {{d}}" for mode in ("forward", "backward")),
    "decisions/gemm_* forward B64 T1214 {d}",
    "decisions/epilogue_* B64 T1214 {d}",
    *(f"attention/attention {mode} B1 T1214 H12 D64 {{d}}" for mode in ("forward", "backward")),
    "decisions/gemm_* dgrad B64 T1214 {d}",
    "decisions/gemm_* wgrad B64 T1214 {d}",
    "block/*layer_norm * B32 T1214 C768 {d}",
    "decisions/gelu * {d}",
    "frontend/log_mel* forward B64 *",
    "frontend/log_mel forward B1 *",
    "patch_embed/patch_embed * B32 S1024 C768 {d}",
    "attention/attention_varlen * {d}",
    "attention/attention_factorised * B64 * {d}",
    "block/block_base * B8 T1214 C768 {d}",
    "patch_embed/patch_embed * B1 S1024 C768 {d}",
)
MODELS = (
    "inference/base_waveform forward B64 N160000 {d}",
    "training/base_waveform_step step B64 S1024 bf16-master",
    "inference/base_waveform forward B1 N160000 {d}",
    "training/base_step_modes step B64 S1024 bf16-master",
)
PROOFS = (
    *("deterministic", "graph", "step graph", "forward graph", "races", "recompiled"),
    "failed graph",
    *("poisoned", "streams", "out of memory", "step memory", "large"),
)


@dataclasses.dataclass
class Known:
    """What a run knows, and learns from its first steps."""

    settings: Settings
    dry_run: bool = False
    capability: int = 90
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    digests: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A part of the plan."""

    name: str
    until_s: float  # in a run of `MINUTES`
    # it gets this much even when those before it were late: without it the rest proves nothing
    at_least_s: float = 0.0
    jobs: Callable[[Known], Sequence[jobs.Job]]
    slots: int = 1
    # environment variables of its workers; None: they share those of the other steps
    extra: Callable[[Known], Mapping[str, str] | None] = lambda known: None
    # what of it there is not, for the summary
    note: Callable[[Known], str] = lambda known: ""
    quiet: bool = False  # it measures time: what runs in the background ends before

    def end(self, minutes: float, began_s: float = 0.0) -> float:
        """Seconds after the start at which nothing of it may run any more, begun when it was."""
        scale = minutes / MINUTES
        return max(self.until_s * scale, began_s + self.at_least_s * scale)


def own_ptxas() -> Path | None:
    """The assembler of the machine's CUDA toolkit, which Triton brings its own copy of."""
    found = shutil.which("ptxas")
    paths = [*([Path(found)] if found else []), _OWN_PTXAS]
    # where one does not answer, Triton falls back to its own without a word: the same bits would prove nothing
    return next((path for path in paths if _ptxas_version(path)), None)


@functools.cache
def _ptxas_version(path: Path) -> str:
    """Such as 13.0; empty where it is none, or does not run."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    release = re.search(r"release ([\d.]+)", said.stdout)
    return release[1].rstrip(".") if release and said.returncode == 0 else ""


def _device(known: Known) -> list[jobs.Job]:
    return [jobs.device_job()]


def smoke_jobs(known: Known) -> list[jobs.Job]:
    """One job an op."""
    return list(jobs.smoke_jobs(known.settings, _SMOKE_S))


def _checks(known: Known) -> list[jobs.Job]:
    lead = known.settings.dtypes[0]
    found = [job | {"limit_s": _CHECK_S} for job in jobs.check_jobs(known.settings, lead)]
    # whole models take longest: they begin first
    found.sort(key=lambda job: job["kind"] == "op")
    return found


def _matching(known: Known, wanted: Sequence[str]) -> Iterator[jobs.Job]:
    """Jobs of cases by their titles, in the order in which they are wanted."""
    lead = known.settings.dtypes[0]
    narrowed = dataclasses.replace(known.settings, dtypes=(lead,))
    by_suite: dict[str, list[jobs.Job]] = {}
    for suite in dict.fromkeys(pattern.partition("/")[0] for pattern in wanted):
        by_suite[suite] = list(jobs.case_jobs(narrowed, suite))
    if known.dry_run:
        # tiny shapes have other titles: one case of each suite shows the way
        yield from (found[0] for found in by_suite.values() if found)
        return
    taken: set[str] = set()
    for pattern in wanted:
        for job in by_suite[pattern.partition("/")[0]]:
            title = job["title"]
            if fnmatch.fnmatchcase(title, pattern.format(d=lead)) and title not in taken:
                taken.add(title)
                yield job


def _missing(wanted: Sequence[str]) -> Callable[[Known], str]:
    """What a step wants and no suite has, as a training step in float16."""

    def note(known: Known) -> str:
        titles = [] if known.dry_run else [job["title"] for job in _matching(known, wanted)]
        texts = [pattern.format(d=known.settings.dtypes[0]) for pattern in wanted]
        absent = [text for text in texts if not fnmatch.filter(titles, text)]
        return "" if known.dry_run or not absent else f"no such case: {', '.join(absent)}"

    return note


def _timed(known: Known, wanted: Sequence[str], limits: Mapping[str, Any], limit_s: float) -> Any:
    own = {} if known.dry_run else {"limits": dict(limits)}
    return [job | own | {"limit_s": limit_s} for job in _matching(known, wanted)]


def _kernels(known: Known) -> list[jobs.Job]:
    return _timed(known, KERNELS, _KERNEL_LIMITS, _KERNEL_S)


def _tune(known: Known) -> list[jobs.Job]:
    return tune_jobs.plan_jobs(known.settings, known.capability, _TUNE_S)


def _tune_note(known: Known) -> str:
    shown = "`python -m benchmarks.tune --dry-run --dtype f32` shows it in the interpreter"
    return shown if known.settings.backend != "triton" else ""


def _models(known: Known) -> list[jobs.Job]:
    found = _timed(known, MODELS, _MODEL_LIMITS, _MODEL_S)
    # as a user's program runs: by what the tables measured as fastest, not by Triton's name
    return [job | {"backend": "auto"} for job in found] if known.settings.cuda else found


def _proofs(known: Known) -> list[jobs.Job]:
    by_name = {job["name"]: job for job in jobs.proof_jobs(known.settings)}
    names = PROOFS[:2] if known.dry_run else PROOFS
    return [by_name[name] | {"limit_s": 45} for name in names]


def _again(known: Known) -> list[jobs.Job]:
    """The smoke once more, held against the bits of the first time; then the memory checker."""
    ptxas = own_ptxas()
    found = []
    if ptxas is not None or known.dry_run:
        what = "those of Triton's own ptxas"
        for job in smoke_jobs(known):
            before = known.digests.get(job["name"], {})
            title = f"{job['title']} by the machine's ptxas"
            found.append(job | {"title": title, "before": before, "what": what})
    memcheck = [job for job in jobs.proof_jobs(known.settings) if job["name"].endswith("memcheck")]
    return [*found, *memcheck]


def _ptxas_environment(known: Known) -> Mapping[str, str]:
    ptxas = own_ptxas()
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return {
        "TRITON_CACHE_DIR": str(cache.with_name(cache.name + "-own-ptxas")),
        **({"TRITON_PTXAS_PATH": str(ptxas)} if ptxas is not None else {}),
        **({"TRITON_PTXAS_BLACKWELL_PATH": str(ptxas)} if ptxas is not None else {}),
    }


def _ptxas_note(known: Known) -> str:
    path = own_ptxas()
    if path is None:
        return "the machine has no ptxas of its own that runs: nothing was compared"
    return f"{path} {_ptxas_version(path)}"


def _probes(known: Known) -> list[jobs.Job]:
    return list(jobs.probe_jobs())


def steps(dry_run: bool = False) -> list[Step]:
    """The plan; a dry run also has steps that hang, crash and lose the device."""
    found = [
        Step(name="device", until_s=20, jobs=_device),
        Step(name="smoke", until_s=70, at_least_s=35, jobs=smoke_jobs, slots=CHECK_SLOTS),
        Step(name="checks", until_s=160, jobs=_checks, slots=CHECK_SLOTS),
        Step(name="kernels", until_s=280, jobs=_kernels, note=_missing(KERNELS), quiet=True),
        Step(name="tune", until_s=370, jobs=_tune, note=_tune_note, quiet=True),
        Step(name="models", until_s=470, jobs=_models, note=_missing(MODELS), quiet=True),
        Step(name="proofs", until_s=520, jobs=_proofs, slots=_PROOF_SLOTS),
        Step(
            name="ptxas",
            until_s=560,
            jobs=_again,
            slots=CHECK_SLOTS,
            extra=_ptxas_environment,
            note=_ptxas_note,
        ),
    ]
    if dry_run:
        found.insert(2, Step(name="probes", until_s=100, jobs=_probes))
    return found


def settings_of_plan(settings: Settings, compiled: bool) -> Settings:
    """Settings under which every step fits: peers that are quick to start."""
    slow = _SLOW_PEERS if settings.cuda else ()
    without = (*slow, *(() if compiled else COMPILED))
    # it names its own shapes
    return dataclasses.replace(settings, without=without, quick=False)


# compiling a model takes a minute or two
COMPILED = ("*compile*", "regional", "flex")


def chosen(found: Sequence[jobs.Job], only: Sequence[str]) -> list[jobs.Job]:
    """The jobs whose titles have one of some texts, all of them if there is none."""
    return [job for job in found if listed(job["title"], only)]

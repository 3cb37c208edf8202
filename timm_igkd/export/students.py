"""Students that fit a budget: candidates measured one after the other with random weights, the best of them first."""

import hashlib
import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from timm.models import get_model_input_config
from torch import nn

from timm_igkd.errors import InputError, UserError, first_line, message_of
from timm_igkd.evaluation.onnx_file import require_onnx_packages
from timm_igkd.export.budget import Budget
from timm_igkd.export.candidates import Architecture, Candidate, Chooser, candidates, rank, size_mb
from timm_igkd.export.record import onnx_environment
from timm_igkd.export.student_latency import AGAIN_S, StudentFile, measure_files, time_again
from timm_igkd.intervals import three_digits
from timm_igkd.models.loading import count_macs, count_parameters, load_model
from timm_igkd.models.truncation import truncate
from timm_igkd.progress import progress_bar
from timm_igkd.random_streams import seeded
from timm_igkd.records import read_record

MOST_MEASURED = 24
MOST_SECONDS = 300.0
REPEATS = 3
RECORD = "students.json"
_FIRST_RATE = 5e-8  # milliseconds of a multiply-accumulate, for a teacher that cannot be measured itself


@dataclass(frozen=True)
class MeasuredStudent(Candidate):
    """A student, or its teacher, as it was measured; parameters and multiply-accumulates are counted, not scaled.

    Attributes:
        files: in float, and where it was asked for in int8.
        cached: they were measured before.
    """

    files: tuple[StudentFile, ...]
    cached: bool

    def best(self, budget: Budget) -> StudentFile | None:
        """Return the fastest of its files that are within a budget, None where none is."""
        fitting = [file for file in self.files if budget.allows(file.latency_ms.median, file.size_mb)]
        return min(fitting, key=lambda file: file.latency_ms.median, default=None)

    @property
    def fastest(self) -> StudentFile:
        """The fastest of its files."""
        return min(self.files, key=lambda file: file.latency_ms.median)


@dataclass(frozen=True)
class StudentsRecord:
    """Students for a budget.

    Attributes:
        teacher: how it was named.
        img_size: side of the images that all of them read.
        num_classes: of the students.
        use_weights: those with weights come first.
        budget: theirs.
        measured_teacher: None where it could not be measured.
        students: that fit, the best first.
        others: that were measured and do not fit, the fastest first.
        left_out: of those tried, and of the teacher, what could not be measured, and why.
        candidates: how many are known that are smaller than the teacher, whatever the budget.
        seconds: that all took.
        environment: versions and hardware.
        smallest: of the candidates; None where there are none, and in older records.
    """

    teacher: str
    img_size: int
    num_classes: int
    use_weights: bool
    budget: Budget
    measured_teacher: MeasuredStudent | None
    students: tuple[MeasuredStudent, ...]
    others: tuple[MeasuredStudent, ...]
    left_out: Mapping[str, str]
    candidates: int
    seconds: float
    environment: Mapping[str, str | int | None]
    smallest: Candidate | None = None

    def choice(self) -> str:
        """Return a line that says which student is the best, and in which of its files."""
        best = self.best()
        file = best.best(self.budget)
        assert file is not None
        return (
            f"student: {best}, the best of {len(self.students)} that fit {self.budget}; its {file.format} file takes "
            f"{file.cost()}{', as measured before' if best.cached else ''}"
        )

    def best(self) -> MeasuredStudent:
        """Return the best student; an InputError where none fits the budget."""
        if self.students:
            return self.students[0]
        raise InputError(f"no student of {self.teacher} at {self.img_size} px fits {self.budget}: {self._why_none()}")

    def _why_none(self) -> str:
        """Return why no student fits, and what to do."""
        missed = {name: why for name, why in self.left_out.items() if name != self.teacher}
        if not self.candidates:
            return "none is known that is smaller; choose a larger teacher, or name the student"
        if not (self.others or missed) and self.smallest is not None:
            least = f"{self.smallest}, takes about {three_digits(size_mb(self.smallest, self.budget))} MB"
            return f"the smallest of {self.candidates} smaller ones, {least}; raise the budget"
        is_timed = self.budget.max_latency_ms is not None
        nearest = "".join([f"; none could be measured: {name} ({why})" for name, why in missed.items()][:1])
        if self.others:
            files = [(one, file) for one in self.others for file in one.files]
            one, file = min(files, key=lambda f: f[1].latency_ms.median if is_timed else f[1].size_mb)
            what = f"the {'fastest' if is_timed else 'smallest'}, {one}"
            nearest = f"; {what}, takes {file.cost()}"
        remedy = "raise the budget" + is_timed * ", or choose a smaller --img-size"
        return f"{len(self.others) + len(missed)} of {self.candidates} smaller ones were tried{nearest}; {remedy}"


def find_students(
    teacher: nn.Module,
    budget: Budget,
    *,
    teacher_name: str,
    teacher_has_weights: bool = True,
    use_weights: bool = True,
    num_classes: int | None = None,
    architectures: Sequence[Architecture] | None = None,
    use_cache: bool = True,
    progress: bool = True,
) -> StudentsRecord:
    """Measure students smaller than a teacher, at most 24 of them in about five minutes, and order those that fit.

    Candidates are timm's architectures and the teacher's truncations of fewer parameters and fewer
    multiply-accumulates than the teacher; `candidates.Chooser` says which is measured next. The best come first by
    `candidates.rank`: those with weights to start from, then those of more parameters. Nobody knows their accuracy.

    Args:
        teacher: a timm classifier in eval mode on the CPU, of the input size that the students will have.
        budget: for the students' ONNX files.
        teacher_name: how the record calls it.
        teacher_has_weights: a truncation starts from its weights.
        use_weights: False: students start from random weights, so that pretrained ones are no advantage.
        num_classes: of the students; default: the teacher's.
        architectures: to choose from; default: the committed table.
        use_cache: take latencies that this machine measured before.
        progress: show a progress bar where standard error is a terminal.

    Raises:
        InputError: a package of the extra `onnx` is missing, a teacher that does not read squares of three channels.
    """
    require_onnx_packages("choosing a student")
    channels, side, width = get_model_input_config(teacher)["input_size"]
    if channels != 3 or side != width:
        raise InputError(
            "students are chosen for squares of 3 channels, "
            f"{teacher_name} reads {channels} x {side} x {width}; give --img-size"
        )
    classes = cast(int, teacher.num_classes) if num_classes is None else num_classes
    known = candidates(teacher, classes, teacher_name, teacher_has_weights, architectures)
    known = [replace(candidate, has_weights=candidate.has_weights and use_weights) for candidate in known]
    pool = [candidate for candidate in known if budget.allows(0, size_mb(candidate, budget))]
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(teacher, classes, side, budget.int8, use_cache, Path(folder))
        own = bench.measure(Candidate(teacher_name, 0, teacher_has_weights, 0, 0), teacher)
        bench.begun, bench.longest = bench.seconds, 0.0  # a slow teacher takes no time away from its students
        chooser = Chooser(pool, budget.max_latency_ms, own.fastest.latency_ms.median / own.macs if own else _FIRST_RATE)
        found = _measure_in_turn(chooser, bench, min(MOST_MEASURED, len(pool)), progress)
        found = bench.measure_anew(found, budget, progress)
        found = bench.repeat(found, progress)
        (own,) = bench.repeat([own], progress=False) if own else (None,)
    fitting = [student for student in found if student.best(budget) is not None]
    return StudentsRecord(
        teacher=teacher_name,
        img_size=side,
        num_classes=classes,
        use_weights=use_weights,
        budget=budget,
        measured_teacher=own,
        students=tuple(sorted(fitting, key=rank, reverse=True)),
        others=tuple(sorted((s for s in found if s not in fitting), key=lambda s: s.fastest.latency_ms.median)),
        left_out=bench.left_out,
        candidates=len(known),
        seconds=round(bench.seconds, 1),
        environment=onnx_environment(),
        smallest=min(known, key=lambda candidate: candidate.num_parameters, default=None),
    )


class _Bench:
    """Builds and measures one student after the other, and keeps the time; see `find_students`."""

    def __init__(self, teacher: nn.Module, num_classes: int, side: int, int8: bool, use_cache: bool, folder: Path):
        self.teacher, self.num_classes, self.side = teacher, num_classes, side
        self.int8, self.use_cache, self.folder = int8, use_cache, folder
        self.left_out: dict[str, str] = {}
        self.started, self.begun, self.longest = time.monotonic(), 0.0, 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def has_time(self) -> bool:
        """Whether another student can be measured, be it as slow as the slowest before."""
        return self.seconds - self.begun + self.longest <= MOST_SECONDS

    def measure(
        self, candidate: Candidate, model: nn.Module | None = None, use_cache: bool | None = None
    ) -> MeasuredStudent | None:
        """Measure a candidate, or say in `left_out` why it could not be, and return None."""
        begun = self.seconds
        try:
            model = self._build(candidate) if model is None else model
            folder = self._folder(candidate)
            folder.mkdir(exist_ok=True)
            use_cache = self.use_cache if use_cache is None else use_cache
            files, cached = measure_files(model, int8=self.int8, use_cache=use_cache, folder=folder)
            size = count_parameters(model), count_macs(model)
        except (OSError, MemoryError):  # of the machine, not of the candidate
            raise
        except Exception as error:  # an architecture's own, as for a size that it cannot read
            self.left_out[str(candidate)] = message_of(error) if isinstance(error, UserError) else first_line(error)
            return None
        finally:
            self.longest = max(self.longest, self.seconds - begun)
        return MeasuredStudent(candidate.name, candidate.drop, candidate.has_weights, *size, files, cached)

    def measure_anew(
        self, students: Sequence[MeasuredStudent], budget: Budget, progress: bool
    ) -> list[MeasuredStudent]:
        """Measure again what the cache says is too slow for a budget, all of it where nothing else fits.

        It may have been measured while the machine did more. Where something fits, what takes more than twice what it
        may is left as it is. What cannot be measured now is left out, whatever the cache says of it.
        """
        if budget.max_latency_ms is None:  # no file is smaller for being timed again
            return list(students)
        found = dict(enumerate(students))
        limit = math.inf if all(one.best(budget) is None for one in students) else 2 * budget.max_latency_ms
        slow = [i for i, one in found.items() if one.cached and one.best(budget) is None]
        slow = sorted((i for i in slow if found[i].fastest.latency_ms.median <= limit), key=lambda i: found[i].macs)
        for index in progress_bar(slow, desc="anew", unit="model", show=progress):
            if not self.has_time:
                break
            if (again := self.measure(found.pop(index), use_cache=False)) is not None:
                found[index] = again
        return [found[index] for index in sorted(found)]

    def repeat(self, students: Sequence[MeasuredStudent], progress: bool) -> list[MeasuredStudent]:
        """Time what is not from the cache again, all in turn: for some seconds a machine may have been slow."""
        found = list(students)
        turns = [index for _ in range(REPEATS) for index, student in enumerate(found) if not student.cached]
        for index in progress_bar(turns, desc="again", unit="model", show=progress):
            if self.seconds - self.begun + AGAIN_S > MOST_SECONDS:
                break
            found[index] = replace(found[index], files=time_again(self._folder(found[index])))
        return found

    def _folder(self, student: Candidate) -> Path:
        name = f"{student.name}-{student.drop}"
        is_short = re.fullmatch(r"[\w.-]{1,100}", name)  # a path or an address is not
        return self.folder / (name if is_short else hashlib.sha256(name.encode()).hexdigest())

    def _build(self, candidate: Candidate) -> nn.Module:
        with seeded(0):
            if candidate.drop:
                return truncate(self.teacher, candidate.drop, self.num_classes)
            options: dict[str, Any] = {"num_classes": self.num_classes, "img_size": self.side, "role": "student"}
            return load_model(candidate.name, pretrained=False, **options)


def _measure_in_turn(chooser: Chooser, bench: _Bench, most: int, progress: bool) -> list[MeasuredStudent]:
    """Measure what `chooser` says until `most` are measured, nothing is left or the time is over."""
    found: list[MeasuredStudent] = []
    with progress_bar(total=most, desc="students", unit="model", show=progress) as bar:
        while len(found) < most and bench.has_time and (candidate := chooser.next()) is not None:
            bar.set_postfix_str(str(candidate))
            if (student := bench.measure(candidate)) is not None:
                found.append(student)
                chooser.learn(candidate, student.fastest.latency_ms.median)
                bar.update()
    return found


def read_students(path: Path) -> StudentsRecord:
    """Read a students.json.

    Raises:
        MissingFileError: no such file. InputError: it is damaged.
    """
    return read_record(StudentsRecord, path)

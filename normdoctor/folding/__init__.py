"""`fold`: norms into the weights around them, wherever that is exact, and the proof that nothing else changed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from normdoctor.errors import CannotRunError, MisfitError, MissingDependencyError, VerificationError
from normdoctor.flow.graph import Node, Op
from normdoctor.flow.plan import FoldPlan, plan_folds
from normdoctor.folding.ledger import OVERFLOW, WatchedPlan, outcomes_of, row_of, tally
from normdoctor.folding.module_ways import try_variants
from normdoctor.folding.opening import Request, look_at, open_subject
from normdoctor.folding.records import Folding, FoldReport, Proof, ProofState
from normdoctor.folding.subjects import Feed, Subject
from normdoctor.folding.verify import Reference, Runnable, coarsest, compare, first_failing, judge, run_original
from normdoctor.places import Verdict
from normdoctor.writing import check_output, folder_beside, replacing

RUNTIME = "onnxruntime"
"""What a folded file must run in where the original does, and not in onnx's reference evaluator alone."""

SOUND_NOISE = 0.01
"""Where more than this share of a channel's size is rounding, other inputs are tried first."""

REPORT_IT = "Please report it with the model, or its --dry-run, if you can share it."

EXPORT_IT = "Export the one way that is needed, and fold that: --export onnx, or a .pt2 of it."

BISECTION_SECONDS = 300.0
"""How long the first norm at which two models part is searched for."""


def fold(
    model: Any,
    example_inputs: Any = None,
    *,
    output: str | Path | None = None,
    export: Literal["onnx"] | None = None,
    opset: int | None = None,
    static: bool = False,
    trust: bool = False,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    key: str | None = None,
    input_shape: str | Iterable[str] = (),
    data: str | Path | None = None,
    eval: bool = False,
    layernorm: bool = False,
    decompose: bool = False,
    state_dict: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    seed: int = 0,
) -> Folding:
    """Fold every norm of a model that can be folded exactly, and run the result beside the original to prove it.

    model: a path (ONNX, .pt2, TorchScript, a pickled module; weights with `arch`) or a live torch.nn.Module.
    example_inputs: for a live module, its arguments; for files `input_shape` ("[NAME=]1,3,224,224[:int64]").
    output: the folded file, MODEL.folded.EXT by default; the input is never touched, a live module not either.
    export, opset, static: to ONNX, with the norms kept, and that is folded; MODEL.onnx by default.
    trust: torch may load the file, which can run code in it. arch, arch_args: what builds the module.
    key: which of several models in the file.
    data: .npz by input name or .npy, instead of random inputs (of `seed`), for the proof.
    eval: the model is meant for inference even where it was saved in training mode.
    layernorm: gain and bias of LayerNorm and RMSNorm move into the next Linear layers.
    decompose: what can be neither absorbed nor merged becomes one multiplication and one addition.
    state_dict: write only the state_dict of the folded module.
    dry_run: only the plan. verify=False: no proof.

    Raises VerificationError, with nothing written, where the folded model computes something else; RefusedError
    where trust or an architecture is needed; InputError for what cannot be read; UsageError for options that do
    not fit together or an output that exists."""
    request = Request(
        model=model,
        example_inputs=example_inputs,
        output=None if output is None else Path(output),
        export=export,
        opset=opset,
        static=static,
        trust=trust,
        arch=arch,
        arch_args=arch_args,
        key=key,
        input_shape=(input_shape,) if isinstance(input_shape, str) else tuple(input_shape),
        data=None if data is None else Path(data),
        state_dict=state_dict,
        seed=seed,
    )
    request.check()
    found = look_at(request)
    target = request.target()
    if target is not None and not dry_run:
        check_output(target, request.path, overwrite)
    with open_subject(request, found) as subject:
        options = _Options(layernorm, decompose, eval or subject.evaluation, dry_run, verify)
        return _Job(request, subject, target, options).run()


@dataclass(frozen=True)
class _Options:
    layernorm: bool
    decompose: bool
    evaluation: bool
    dry_run: bool
    verify: bool


@dataclass
class _Job:
    """One fold under way."""

    request: Request
    subject: Subject
    target: Path | None
    """Where the folded file goes, None for a live module that only stays in memory."""
    options: _Options
    excluded: dict[Node, tuple[str, str]] = field(default_factory=dict)
    """Norms whose folded weights nothing can hold."""

    def run(self) -> Folding:
        if self.options.dry_run:
            plan = self._settle(self._only_look)[0]
            return self._told(plan, Proof(state=ProofState.NOT_NEEDED, reason="a dry run"))
        plan = WatchedPlan(self._plan())
        if plan.changes_nothing:
            return self._unchanged(plan)
        if self.target is None:
            plan, built = self._settle(lambda plan: self.subject.build(plan, None))
            proof = self._prove(plan, built, None)
            return self._told(plan, proof, module=self._module(built))
        with folder_beside(self.target) as folder:
            first = self._place_in(folder, "folded")
            plan, built = self._settle(lambda plan: self.subject.build(plan, first))
            proof = self._prove(plan, built, folder)
            self._put_in_place(plan, first)
        return self._told(plan, proof, module=self._module(built), output=self.target)

    # the plan

    def _plan(self, excluded: Mapping[Node, tuple[str, str]] | None = None) -> FoldPlan:
        left = dict(self.excluded if excluded is None else excluded)
        while True:
            plan = plan_folds(
                self.subject.graph,
                layernorm=self.options.layernorm,
                decompose=self.options.decompose,
                evaluation=self.options.evaluation,
                excluded=left,
            )
            # What the code of a module cannot express is known only when the whole plan is.
            refused = self.subject.refused(plan)
            if refused.keys() <= left.keys():
                return plan
            left = {**refused, **left}

    def _settle(self, build: Callable[[WatchedPlan], Any]) -> tuple[WatchedPlan, Any]:
        """A plan all of whose weights can be stored, and what `build` made of it."""
        while True:
            plan = WatchedPlan(self._plan())
            built = build(plan)
            if not plan.broken:
                return plan, built
            culprits = outcomes_of(plan.broken, plan.outcomes)
            sentence = "; ".join(dict.fromkeys(plan.broken.values()))
            new = {found.norm: (OVERFLOW, sentence) for found in culprits if found.norm not in self.excluded}
            if not new:
                raise AssertionError(f"weights that cannot be stored belong to no fold: {sentence}")
            self.excluded |= new

    def _only_look(self, plan: WatchedPlan) -> None:
        for _ in plan.new_inputs():
            pass

    # the proof

    def _prove(self, plan: WatchedPlan, built: Any, folder: Path | None) -> Proof:
        """Raises VerificationError where the two models differ."""
        if not self.options.verify:
            return Proof(state=ProofState.NOT_ASKED, reason="--no-verify")
        begin = time.perf_counter()
        try:
            original = self._original(folder)
            feed, reference = self._reference(original)
        except MisfitError:
            if self.request.gives_inputs:
                raise
            return Proof(state=ProofState.UNVERIFIED, reason="none of the inputs that were made up fits; give --data")
        except (CannotRunError, MissingDependencyError) as error:
            return Proof(state=ProofState.UNVERIFIED, reason=error.message)
        proof, hint = self._compared(built, plan, feed, reference, begin), REPORT_IT
        if proof.state is not ProofState.FAILED:
            tried = try_variants(
                original,
                feed,
                reference.noise,
                lambda other: run_original(original, other.inputs),
                lambda other, expected: self._compared(built, plan, other, expected, begin),
            )
            if tried.failed is None:
                inputs = " and ".join(filter(None, (proof.inputs, tried.words)))
                return replace(proof, inputs=inputs, seconds=time.perf_counter() - begin)
            feed, reference, proof = tried.failed
            hint = EXPORT_IT
        first = self._first_norm(plan, feed, reference, folder)
        proof = replace(proof, first_norm=first)
        at = f", from the norm {first} on" if first else ""
        raise VerificationError(
            f"{self.request.source}: the folded model is not the same{at}: {proof.reason}",
            f"Nothing was written. {hint}",
            self._told(plan, proof).report,
        )

    def _compared(self, built: Any, plan: WatchedPlan, feed: Feed, reference: Reference, begin: float) -> Proof:
        """What the folded model makes of the same inputs. That it cannot be run, as the original can, is a failure."""
        folded = self.subject.folded(built)
        try:
            differences = compare(reference, folded.run(feed.inputs), _precision(plan))
            lost = reference.engine.startswith(RUNTIME) and not folded.engine.startswith(RUNTIME)
            reason = f"it runs only in {folded.engine}" if lost else ""
        except CannotRunError as error:
            differences, reason = (), f"it cannot be run ({error.message})"
        proof = judge(reference, differences, feed.words, time.perf_counter() - begin)
        return replace(proof, state=ProofState.FAILED, reason=reason) if reason else proof

    def _original(self, folder: Path | None) -> Runnable:
        """The model as it was; with --eval as it is meant, so without any fold but with its norms in eval mode."""
        training = any(node.attributes.get("training") for node in self.subject.graph.of(Op.BATCH_NORM))
        if not self.options.evaluation or not training:
            return self.subject.original()
        meant = self._plan({outcome.norm: ("later", "") for outcome in self._plan().outcomes})
        return self.subject.folded(self.subject.build(meant, folder and self._place_in(folder, "meant")))

    def _reference(self, original: Runnable) -> tuple[Feed, Reference]:
        """Inputs that the original takes, and what it makes of them. Where there is a choice: such as leave time for
        a run in float64, and make it give more than rounding."""
        failure = MisfitError("there are no inputs to run it on")
        found: list[tuple[bool, float, Feed, Reference]] = []
        slow = math.inf
        for feed in self.subject.feeds():
            if feed.size >= slow:
                continue
            try:
                reference = run_original(original, feed.inputs)
            except MisfitError as error:
                failure = error
                continue
            found.append((reference.too_slow or reference.exact is None, reference.noise, feed, reference))
            if reference.too_slow:
                slow = feed.size
            elif reference.noise <= SOUND_NOISE:
                break
        if not found:
            raise failure
        *_, feed, reference = min(found, key=lambda entry: entry[:2])
        return feed, reference

    def _first_norm(self, plan: FoldPlan, feed: Feed, reference: Reference, folder: Path | None) -> str:
        """The first norm whose fold makes the two part; empty where it cannot be told."""
        folds = [outcome for outcome in plan.outcomes if outcome.verdict is not Verdict.LEFT]
        deadline = time.perf_counter() + BISECTION_SECONDS

        def fails(done: int) -> bool:
            if time.perf_counter() > deadline:
                raise CannotRunError("the search takes too long")
            later = {outcome.norm: ("later", "") for outcome in folds[done:]}
            partly = WatchedPlan(self._plan(self.excluded | later))
            built = self.subject.build(partly, None if folder is None else self._place_in(folder, f"first-{done}"))
            return self._compared(built, partly, feed, reference, 0.0).state is ProofState.FAILED

        with suppress(CannotRunError):
            if not fails(0):  # else no fold is to blame
                return folds[first_failing(len(folds), fails) - 1].norm.label
        return ""

    # the result

    def _place_in(self, folder: Path, name: str) -> Path:
        """The output's name in a folder of its own, so that files beside it cannot meet others."""
        assert self.target is not None
        place = folder / name
        place.mkdir()
        return place / self.target.name

    def _put_in_place(self, plan: WatchedPlan, built: Path) -> None:
        """The very file that was proven becomes the output, the data beside it first."""
        assert self.target is not None
        beside = [path for path in built.parent.iterdir() if path != built]
        free = self.target.exists() or not any((self.target.parent / path.name).exists() for path in beside)
        if not free or any(path.is_dir() for path in beside):
            self.subject.build(plan, self.target)  # names in the model must change: it is written again where it goes
            return
        for path in (*beside, built):
            with replacing(self.target.parent / path.name) as temporary:
                path.replace(temporary)

    def _unchanged(self, plan: WatchedPlan) -> Folding:
        proof = Proof(state=ProofState.NOT_NEEDED, reason="nothing was folded")
        built = self.subject.build(plan, self.target)
        unchanged = self.request.export is None
        return self._told(plan, proof, module=self._module(built), output=self.target, unchanged=unchanged)

    def _module(self, built: Any) -> Any:
        """What was built, for who gave a live module; None for files."""
        return built if self.request.path is None and self.request.export is None else None

    def _told(
        self,
        plan: WatchedPlan,
        proof: Proof,
        *,
        output: Path | None = None,
        module: Any = None,
        unchanged: bool = False,
    ) -> Folding:
        counts = tally(self.subject.graph, plan)
        report = FoldReport(
            source=self.request.source,
            format=self.subject.format,
            rows=tuple(map(row_of, plan.outcomes)),
            parameters=counts.parameters,
            nodes=counts.nodes,
            copies=counts.copies,
            overflows=tuple(plan.overflows),
            proof=proof,
            notes=(*self.subject.notes, *self.subject.graph.notes),
            dry_run=self.options.dry_run,
            output=None if output is None else str(output),
            unchanged=unchanged,
        )
        return Folding(source=report.source, format=report.format, report=report, path=output, module=module)


def _precision(plan: WatchedPlan) -> str:
    """The coarsest type of the weights that the plan changes and of what its folds pass."""
    folds = (outcome for outcome in plan.outcomes if outcome.verdict is not Verdict.LEFT)
    passed = {node.y.dtype or "" for outcome in folds for node in (outcome.norm, *outcome.through)}
    return coarsest({*passed, *(size.dtype for size in plan.sizes.values())})

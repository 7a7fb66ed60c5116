"""A residual added to a model in memory, all of it or nothing, and taken back to the bit."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ires_kernels.checking import guards
from ires_kernels.checkpoints import configs, hub, roles
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.files import interrupts
from ires_kernels.files.plain import Refused, plain
from ires_kernels.live import parts, sharding
from ires_kernels.live import tensors as held
from ires_kernels.live.snapshot import Snapshot
from ires_kernels.live.target import Target
from ires_kernels.planning import ancestry
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.inputs import Pair, StrPath, check_flags, open_inputs, roles_of_apply
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.steps import Step
from ires_kernels.planning.sums import Sum, written_out
from ires_kernels.streaming import together
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.streaming.reader import second_copies
from ires_kernels.streaming.together import Part

_newest: WeakKeyDictionary[nn.Module, weakref.ref[Applied]] = WeakKeyDictionary()
"""The last update of each module that was not taken back."""


_OR_FORCE = ", or give force=True, with which it is lost"
_PACKED = "; or keep a copy the next time, apply_(…, undo=True), and give force=True, with which it is lost"


class Applied:
    """What `apply_` did to a module, and how to take it back. As a context manager it is taken back at the end.

    It holds the bits from before, as a copy or packed; they go with it.
    """

    def __init__(self, module: nn.Module, target: Target, changed: Sequence[str], *, undo: bool):
        self.changed = tuple(changed)
        """The names of the tensors that were changed; of a sharded module those of which something is here."""
        self.nbytes = target.before.nbytes if undo else 0
        """Bytes of memory that are held for `undo`."""
        self._kept = undo
        self._module = module
        self._tensors = {name: target.tensors[name] for name in changed}
        self._before: Snapshot | None = target.before if undo else None
        self._turn = threading.RLock()
        self._versions = self._seen()
        known = _newest.get(module)
        self._under = known() if known is not None else None
        _newest[module] = weakref.ref(self)

    def undo(self, *, force: bool = False) -> None:
        """Give every parameter and buffer the bits that it had. Again it does nothing.

        force  also where they have changed since, by an optimiser or by another `apply_`: that is lost. Where the bits
               are others by now, a copy has to be there: from them nothing comes again that was packed

        What torch does not count, as changes through `data`, is noticed of what was packed, by its bits; of what was
        copied it is lost.

        Of a sharded module each process gives back what it has, and asks nobody: all of them are to call it.

        Raises ArgumentError where they have, where the module has other tensors in their places (as load_state_dict has
        with assign=True), where they have another dtype or shape now, and where nothing was kept.
        """
        if not self._kept:
            raise ArgumentError("apply_ was called with undo=False: no bits were kept that could be given back.")
        with self._turn:  # of threads that undo it at a time one does
            if self._before is not None:
                self._take_back(self._before, force=force)

    def _take_back(self, before: Snapshot, *, force: bool) -> None:
        sharding.reshard(self._module)
        here = {name: sharding.local(tensor) for name, tensor in self._tensors.items()}
        for name, tensor in here.items():
            info = before.infos[name]
            if (held.DTYPES.get(tensor.dtype), tuple(tensor.shape)) != (info.dtype, info.shape):
                raise ArgumentError(
                    f"{brief(name)} is {tensor.dtype} of shape {list(tensor.shape)} now, and was {info.dtype} of shape "
                    f"{list(info.shape)}: no bits can be given back. Undo before the model is converted."
                )
            if not held.has_memory(tensor):
                raise ArgumentError(
                    f"{brief(name)} has no memory now: its storage was freed or resized. Undo when it is back."
                )
        there = {id(tensor) for _, tensor in held.named(self._module)}
        for name, tensor in self._tensors.items():
            if id(tensor) not in there and not force:
                raise ArgumentError(
                    f"{brief(name)} is not the tensor that was changed: the module has another in its place, or none. "
                    "Undo before it is replaced, or give force=True: the old tensor gets its bits, and nothing else."
                )
        if self._versions != self._seen() and not force:
            raise ArgumentError(
                f"{type(self._module).__name__} has changed since this was applied, by an optimiser or another apply_. "
                f"Undo that first{_OR_FORCE if not before.is_packed else _PACKED}."
            )
        with interrupts.held():
            other = before.differing(here, self.changed)
            if other is not None:
                raise ArgumentError(
                    f"{brief(other)} has other bits than this update left there, and those from before were packed by "
                    "these: nothing was taken back. Undo first what was done since; or keep a copy the next time, "
                    "apply_(…, undo=True), and give force=True."
                )
            before.put_back(here, self.changed)
            self._before = None
            known = _newest.get(self._module)
            if known is not None and known() is self:
                del _newest[self._module]
                if self._under is not None and self._under._before is not None:
                    self._under._versions = self._under._seen()
                    _newest[self._module] = weakref.ref(self._under)
        self._under = None

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        undone = self._kept and self._before is None
        state = "undone" if undone else f"{len(self.changed)} tensors changed, {self.nbytes} bytes kept"
        return f"<apply_ to {type(self._module).__name__}: {state}>"

    def _seen(self) -> list[tuple[int, int]]:
        return [(tensor._version, sharding.local(tensor)._version) for tensor in self._tensors.values()]


def apply_(
    module: nn.Module,
    residual: StrPath | Sum | Sequence[StrPath | Sum] | Sequence[Pair | Sum],
    alpha: float | Sequence[float] = 1.0,
    *,
    alphas: Iterable[tuple[str, float | Sequence[float]]] | Mapping[str, float | Sequence[float]] = (),
    skip: Iterable[str] | str = (),
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    vocabulary: str | None = None,
    renames: Iterable[str | tuple[str, str]] | Mapping[str, str] = (),
    trust_names: bool = False,
    undo: bool | str = True,
    threads: int | None = None,
    progress: Progress | None = None,
    follow_links: bool = False,
) -> Applied:
    """Add alpha * residual to the parameters and buffers of a module, in place, on the devices where they are.

    >>> from safetensors.torch import save_file
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).eval()
    >>> before = model[0].weight.detach().clone()
    >>> save_file({"0.weight": before}, "base.safetensors")
    >>> save_file({"0.weight": before + 1}, "instruct.safetensors")
    >>> with ik.apply_(model, ("instruct.safetensors", "base.safetensors"), 0.5):
    ...     torch.allclose(model[0].weight, before + 0.5)
    True
    >>> torch.equal(model[0].weight, before)
    True

    residual  as for `apply`: a residual folder, the pair of models (instruct, base), or a list of either

    Tensors are matched as for files, and get the bits that the files of `apply` would have: by name, in another layout,
    or in parts; what is tied is changed once; buffers that are not persistent are left alone. Parameters stay the same
    objects, with their requires_grad; their version counters tell autograd. Everything is checked first, and where
    something fails later, or is interrupted, the module gets back the bits that it had.

    Returns what can take it back: ``with ik.apply_(model, residual, 0.7): …`` does so at the end. For that a copy of
    what is changed stays in the memory of the CPU; without the returned object it is the system's at once. What an
    optimiser has of the model, such as moments and float32 copies of its weights, does not know of the update: make it
    anew.

    undo  True: keep a copy, which can also be given back where others have changed the module since: undo(force=True).
          "packed": keep what the update did to the bits, from which those before come again: a fifth to a half of the
          memory of a copy of bfloat16 weights, at no time more, and no file is needed again. It takes longer, about as
          long again as the update. Of a sharded module, of tensors in the memory of a GPU or of strides of their own,
          of other dtypes than bfloat16, float16 and float32, and where the extension is missing, a copy is kept.
          False: keep no bits, which saves that memory, and of the first update, whose copy goes to fresh memory, half
          of the time. Nothing can be taken back then, and where something fails after the first tensor was changed, a
          warning says that the module is no longer whole. Of a module that several processes hold
          they are kept until all have succeeded

    Of a module that several processes hold, as fully_shard and parallelize_module make it of DTensors, each of them
    calls this, reads what belongs to its own blocks, and has the bits that the whole module would have there; and the
    result says what was changed in this process. Where one of them fails all do, with PeerError, and all of them have
    the bits from before.

    The other arguments, and errors, as for `apply`; and ArgumentError for a module whose tensors are on the meta
    device, quantized, or of torch.inference_mode, and for DTensors that are sums still to be made (Partial).
    """
    check_flags(follow_links=follow_links)
    if not (isinstance(undo, bool) or undo == "packed"):
        raise TypeError(f'undo is {type(undo).__name__} {brief(undo)}, wanted True, False or "packed"')
    module = held.inner(module)
    with sharding.peers(module) as peers:
        options = Options.of("cpu", threads, progress)
        added, alpha, alphas = written_out(residual, alpha, alphas)
        paths = roles_of_apply("", hub.locals_of(added), follow_links=follow_links)
        del paths["target"]
        rules = Rules.of(
            len(roles.added(paths)),
            alpha=alpha,
            alphas=alphas,
            skip=skip,
            allow_missing=allow_missing,
            rounding=rounding,
            seed=seed,
            vocabulary=vocabulary,
            renames=renames,
            trust_names=trust_names,
        )
        sources = open_inputs(paths, follow_links=follow_links)
        tensors = held.of(module, [source.tensors for source in sources.values()])
        if module.training and peers.is_first:
            warnings.warn(
                f"{type(module).__name__} is in training mode: an optimiser's state does not know of this update",
                stacklevel=2,
            )
        target = Target(module, tensors, peers)
        inputs = {"target": target.checkpoint(held.config(module)), **sources}
        try:
            plan, said = _plan(inputs, rules, target)
            for text in said if peers.is_first else ():
                warnings.warn(plain(target.named(text)), stacklevel=2)
            changed = target.changed(plan)
            here = target.local()
            try:
                with interrupts.held():
                    target.keep(plan, changed, undo=bool(undo), packed=undo == "packed")
                    _fill(plan, {name: here[name] for name in changed}, target, options)
                    applied = Applied(module, target, changed, undo=bool(undo))
                    peers.end()
            except BaseException:  # also what a signal has raised as the region was left
                with interrupts.held():
                    target.before.put_back(here, changed)
                    target.before.settle()
                if not undo and not peers.are_several:
                    warnings.warn(f"{type(module).__name__} may be changed in part: load it again", stacklevel=2)
                raise
        except Refused as error:
            error.args = (target.named(f"{error}"),)
            raise
    return applied


def _plan(inputs: Mapping[str, Checkpoint], rules: Rules, target: Target) -> tuple[Plan, list[str]]:
    """What is done, and what is to be said of it. Refuses what would give a tensor another shape."""
    with Looks(inputs, target.memory) as looks:
        plan = plan_apply(inputs, rules, second_copies(inputs, target.memory), looks=looks)
        kin = ancestry.compare(inputs, plan.steps, looks)
    for step in plan.steps:
        if step.shape != tuple(target.tensors[step.name].shape):
            raise CheckpointError(
                f"{brief(step.name)} has shape {list(target.tensors[step.name].shape)} in the module, and would get "
                f'{list(step.shape)}. Call resize_token_embeddings first, or give vocabulary="target".'
            )
    guards.compare(plan)
    guards.check_companions(plan)
    target.planned(plan)
    left_out = [plan.share.text()] if plan.share else []
    return plan, [*configs.differences(inputs), *ancestry.warnings(kin, inputs), *left_out]


def _fill(plan: Plan, tensors: Mapping[str, Tensor], target: Target, options: Options) -> None:
    """Carry out the steps of these tensors, on all their devices at the same time, and make sure of what was read."""
    from ires_kernels.streaming import device as devices

    # Of a part no digest is known: then each process has some tensors to check as a whole.
    hashed = [role for role, model in plan.inputs.items() if model.kind == "residual" and not target.peers.are_several]
    outcome = Outcome()
    for steps in target.steps(plan, tensors.keys()):
        shares: dict[torch.device, list[Step]] = {}
        for step in steps:
            shares.setdefault(tensors[step.name].device, []).append(step)
        into = {name: _contiguous(tensors[name]) for name in dict.fromkeys(step.name for step in steps)}
        outcome.update(together.fill(
            [
                Part({step.name: into[step.name] for step in mine}, mine, devices.processors(devices.resolve(device)))
                for device, mine in shares.items()
            ],
            guards.file_ids(plan),
            plan.rules,
            hashed=hashed,
            threads=options.threads,
            progress=options.progress,
            memory=target.memory,
            placed=target.before.placed,
        ))  # fmt: skip
        for name, tensor in into.items():
            if tensor is not tensors[name]:
                tensors[name].copy_(tensor)
            torch.autograd.graph.increment_version(target.tensors[name])
    target.before.settle()
    guards.check_residuals(plan, outcome.inputs, options.threads, only=parts.to_check(plan, target.peers))
    guards.check_unchanged(plan, outcome.inputs, but={"target"}, threads=options.threads)


def _contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or where its elements do not follow each other memory for the same ones."""
    return tensor if tensor.is_contiguous() else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

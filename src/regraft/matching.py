"""Matching: the permutation that moves one network's units onto another's.

``regraft.match`` minimises sum_t ||G2[t] - pi G1[t]||^2 over pi by coordinate descent over the permutation groups
(Ainsworth et al., Git Re-Basin, Algorithm 1; Chijiwa, eqs. 2, 3 and 6). One group's step is a similarity matrix and
a linear assignment. Nothing that is known already is computed again:

- a group is visited only when a neighbouring permutation, or the data, changed since its last solve;
- its similarity is kept, and corrected by the rank-m product of the m entries that changed in a neighbour;
- new steps (FGMT appends one pair of gradients at a time) add their own product and leave the rest alone;
- an assignment starts from the duals of the group's last one;
- groups that share no tensor are solved at the same time.

All of these leave the result as it is: `regraft.reference.matching` finds the same objective without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft.clock import Clock, Cost, charged
from regraft.nested import Family
from regraft.symmetry import PermutationSpec
from regraft.tensors import Perm, Tensors, check_alike, check_finite
from regraft_kernels import Duals, Term, assign_many, similarity, similarity_many, similarity_update_

Gathers = dict[tuple[str, int], Tensor]  # (tensor, axis) -> index vector

# A new assignment must raise the objective by more than this part of the similarity that it collects: below lies
# the rounding of float32 sums, and ties, where "improvements" would go round in circles.
RELATIVE_GAIN = {torch.float32: 1e-7, torch.float64: 1e-12}
# Each rank-m correction adds a rounding error of its own (40 of them, at 2048 units: 7e-7 of the largest entry, what a
# product in float32 has too); float32 similarities are built anew after so many.
CORRECTIONS_BEFORE_REBUILD = 64
# From this part of a rebuild's products on, correcting (which gathers columns, too) gains nothing.
WORTH_CORRECTING = 0.8
# The duals of an assignment are recovered only where more than this part of it moved: older ones start the next solve
# nearly as well, and recovering takes longer than a warm solve.
RENEW_DUALS = 0.2


@dataclass(frozen=True)
class Match:
    """What `match` found.

    Attributes:
        perm: group -> int64 index vector [n]; (pi theta)[i] = theta[perm[i]].
        objective: sum_t <G2[t], pi G1[t]>, the part of the squared distance that depends on pi, negated and halved.
        sweeps: rounds over the groups, the last of which changed nothing.
        seconds: by phase: "similarity", "assignment", "objective".
    """

    perm: Perm
    objective: float
    sweeps: int
    seconds: dict[str, Cost]

    @property
    def cost(self) -> Cost:
        """The sum over the phases."""
        return charged(self.seconds)


def match(
    spec: PermutationSpec,
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    *,
    start: Perm | None = None,
    generator: torch.Generator | None = None,
    max_sweeps: int = 100,
    backend: str = "auto",
    assignment: str = "auto",
) -> Match:
    """The permutation pi that brings `source` closest to `target`, by coordinate descent.

    Args:
        spec: the model's permutation groups.
        target, source: tensors by name, each of the model's shape (weights) or [T, *shape] (stacks, for example
            of gradients); the same names and floating dtypes on both sides (others do not count). Names that the
            spec knows and these lack do not take part: buffers, where parameters alone are matched.
        start: where the descent begins; the identity when not given.
        generator: draws the order in which the groups are visited; without one it is the spec's.
        max_sweeps: an upper bound that ends a descent early.
        backend: of the similarity, "auto", "torch" or "triton".
        assignment: of the linear assignment, "auto" or a name that `regraft_kernels.assign` knows.

    Raises:
        ValueError: names, shapes, dtypes or devices that differ, a tensor that the spec does not know, values that
            are not finite, zero steps; the tensor is named.
    """
    check_alike(target, source, "the target", "the source")
    target, source = _stacked(spec, target), _stacked(spec, source)
    check_finite(target, "the target")
    check_finite(source, "the source")
    descent = Descent.over(
        spec, target, source, _steps(target), start=start, generator=generator, backend=backend
    )
    return descend_(descent, max_sweeps=max_sweeps, assignment=assignment)


@dataclass(frozen=True)
class _Place:
    """One axis of one tensor on which a group's units stand."""

    name: str
    axis: int
    others: tuple[int, ...]  # the tensor's other axes that permutations move
    positions: Tensor | None  # [n, mult], or None where position i is unit i


@dataclass(frozen=True)
class _Neighbourhood:
    """What the similarity of one group is made of, and what it depends on."""

    single: tuple[_Place, ...]  # tensors that have the group on one axis: linear in its permutation
    coupled: tuple[_Place, ...]  # tensors that have it on several: quadratic
    groups: tuple[str, ...]  # whose permutations the similarity depends on; itself where something is coupled


@dataclass
class _Cached:
    """The similarity of one group and what it was built from."""

    similarity: Tensor  # [n, n], the terms in which the group stands on one axis only
    steps: int
    indices: Gathers  # what the other axes were gathered with
    corrections: int = 0


@dataclass
class Descent:
    """The state of a coordinate descent; lives as long as stacks are appended to (FGMT).

    Attributes:
        target, source: stacks [capacity, *shape] by name, of which the first `steps` are filled.
        colours: groups by colour; those of one colour share no tensor.
        perm: the current permutation.
        backend: of the similarity kernels.
        objective: the permutation's objective over the first `counted` steps.
        version: group -> how often its permutation changed.
        solved: group -> what its last solve looked at.
    """

    spec: PermutationSpec
    target: Tensors
    source: Tensors
    steps: int
    colours: tuple[tuple[str, ...], ...]
    around: dict[str, _Neighbourhood]
    perm: Perm
    backend: str = "auto"
    objective: float = 0.0
    counted: int = 0
    version: Counter[str] = field(default_factory=Counter)
    solved: dict[str, object] = field(default_factory=dict)
    cached: dict[str, _Cached] = field(default_factory=dict)
    duals: dict[str, Duals] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(iter(self.target.values())).device

    @classmethod
    def over(
        cls,
        spec: PermutationSpec,
        target: Tensors,
        source: Tensors,
        steps: int,
        *,
        start: Perm | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> Descent:
        """A descent over given stacks, of which the first `steps` are filled."""
        names = frozenset(target)
        classes = colours(spec, names, generator)
        start = spec.identity() if start is None else start
        spec.check(start)
        device = next(iter(target.values())).device
        perm = {group: index.to(device) for group, index in start.items()}
        around = {g: _neighbourhood(spec, g, names, perm) for members in classes for g in members}
        return cls(spec, target, source, steps, classes, around, perm, backend)

    @classmethod
    def allocate(
        cls,
        spec: PermutationSpec,
        like: Tensors,
        capacity: int,
        *,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> Descent:
        """An empty descent, from the identity, with room for `capacity` steps of tensors like those of `like`."""
        target, source = (
            {name: _empty_stack(tensor, capacity) for name, tensor in like.items()} for _ in range(2)
        )
        return cls.over(spec, target, source, 0, generator=generator, backend=backend)


def append_(descent: Descent, target: Tensors, source: Tensors) -> None:
    """Add one step's tensors to the stacks (in place), at their next free place."""
    for stack, tensors in ((descent.target, target), (descent.source, source)):
        for name, whole in stack.items():
            whole[descent.steps].copy_(tensors[name])
    descent.steps += 1


def restart_(descent: Descent, perm: Perm) -> None:
    """Let the next descent begin at `perm`."""
    for group, index in perm.items():
        index = index.to(descent.perm[group].device)
        if not torch.equal(index, descent.perm[group]):
            descent.perm[group] = index
            descent.version[group] += 1
    descent.counted, descent.objective = 0, 0.0
    descent.solved.clear()


def clear_(descent: Descent) -> None:
    """Forget all steps and what was computed from them; keep the permutation and the duals to start from."""
    descent.steps = 0
    descent.cached.clear()
    restart_(descent, descent.perm)


def descend_(descent: Descent, *, max_sweeps: int = 100, assignment: str = "auto") -> Match:
    """Sweep over the groups until nothing improves; moves `descent.perm` and returns what was found.

    Raises:
        ValueError: no step, or fewer than one sweep.
    """
    if descent.steps < 1:
        raise ValueError("there is nothing to match: zero steps")
    if max_sweeps < 1:
        raise ValueError(f"max_sweeps must be at least 1, got {max_sweeps}")
    clock = Clock()
    with clock.phase("objective", descent.device):
        descent.objective += _objective(descent, descent.target, descent.perm, descent.counted)
        descent.counted = descent.steps
    sweeps, improved = 0, True
    while improved and sweeps < max_sweeps:
        improved = any([_visit_(descent, colour, clock, assignment) for colour in descent.colours])
        for family in (groups for groups in descent.spec.families if len(groups) > 1):
            improved |= _visit_family_(descent, family, clock, assignment)
        sweeps += 1
    return Match(dict(descent.perm), descent.objective, sweeps, clock.seconds)


def colours(
    spec: PermutationSpec, names: frozenset[str], generator: torch.Generator | None = None
) -> tuple[tuple[str, ...], ...]:
    """The groups that stand in `names`, sorted into classes without a common tensor (greedy colouring).

    Visiting class after class is a sweep: within one the order does not matter, as no similarity of a class depends
    on another permutation of it.
    """
    alone = [g for g, *nested in spec.families if not nested]
    groups = [g for g in alone if any(name in names for name, _ in spec.tensors_of(g))]
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    tensors = {g: {name for name, _ in spec.tensors_of(g)} & names for g in groups}
    classes: list[list[str]] = []
    for group in groups:
        free = (c for c in classes if all(tensors[group].isdisjoint(tensors[other]) for other in c))
        members = next(free, None)
        if members is None:
            classes.append(members := [])
        members.append(group)
    return tuple(tuple(members) for members in classes)


def _visit_(descent: Descent, colour: tuple[str, ...], clock: Clock, assignment: str) -> bool:
    """Solve the groups of one colour anew where anything they depend on changed; true if one improved."""
    stale = [group for group in colour if descent.solved.get(group) != _depends_on(descent, group)]
    if not stale:
        return False
    device = descent.device
    with clock.phase("similarity", device):
        own = _similarities_(descent, stale)
        both = {group: _coupled_similarity(descent, group) for group in stale}
        scores = {g: own[g] if both[g] is None else own[g] + both[g] for g in stale}
    with clock.phase("assignment", device):
        solutions = assign_many(
            [scores[g] for g in stale],
            backend=assignment,
            warm=[descent.duals.get(g) for g in stale],
            names=[f"similarity of group {g!r}" for g in stale],
        )
    improved = False
    with clock.phase("objective", device):
        for group, solution in zip(stale, solutions, strict=True):
            moved = _changed_share(descent.perm[group].cpu(), solution.perm)
            if group not in descent.duals or moved > RENEW_DUALS:
                descent.duals[group] = solution.duals
            descent.solved[group] = _depends_on(descent, group)
            improved |= _accept_(descent, group, own[group], solution.perm.to(device))
    return improved


def _visit_family_(descent: Descent, family: tuple[str, ...], clock: Clock, assignment: str) -> bool:
    """Solve groups that are nested in one another; true if the true objective rose."""
    names = sorted({name for g in family for name, _ in descent.spec.tensors_of(g)} & descent.target.keys())
    held = [g for g in family if any(name in names for name, _ in descent.spec.tensors_of(g))]
    around = {g: _neighbourhood(descent.spec, g, frozenset(names), descent.perm) for g in held}
    depends = descent.steps, *(descent.version[other] for g in held for other in (g, *around[g].groups))
    if descent.solved.get(family[0]) == depends:
        return False
    improved = False
    with clock.phase("similarity", descent.device):
        places = {g: [*around[g].single, *around[g].coupled] for g in held}
        terms = [_terms(descent, places[g], 0, descent.steps, _gathers(descent, places[g])) for g in held]
        found = similarity_many(terms, backend=descent.backend)
    scores = {group: matrix.cpu() for group, matrix in zip(held, found, strict=True)}
    for candidate in Family(descent.spec, family, scores, assignment).candidates(descent.perm):
        with clock.phase("objective", descent.device):
            moved = descent.perm | {group: index.to(descent.device) for group, index in candidate.items()}
            before, after = (_objective(descent, names, perm, 0) for perm in (descent.perm, moved))
        if after - before > RELATIVE_GAIN[found[0].dtype] * max(abs(before), abs(after)):
            for group in family:
                descent.version[group] += not torch.equal(descent.perm[group], moved[group])
            descent.perm, descent.objective, improved = moved, descent.objective + after - before, True
    descent.solved[family[0]] = depends
    return improved


def _accept_(descent: Descent, group: str, own: Tensor, candidate: Tensor) -> bool:
    """Move to `candidate` if the true objective rises by more than rounding; true if it did."""
    current = descent.perm[group]
    before, after = _collected(own, current), _collected(own, candidate)
    if descent.around[group].coupled:
        before += _coupled_objective(descent, group, current)
        after += _coupled_objective(descent, group, candidate)
    scale = max(abs(before), abs(after))
    if after - before <= RELATIVE_GAIN[own.dtype] * scale:
        return False
    descent.perm[group] = candidate
    descent.version[group] += 1
    descent.objective += after - before
    return True


def _depends_on(descent: Descent, group: str) -> tuple[object, ...]:
    """What a solve of `group` looks at: the steps, and its neighbours' permutations (by version)."""
    return descent.steps, tuple(descent.version[other] for other in descent.around[group].groups)


def _similarities_(descent: Descent, groups: Sequence[str]) -> dict[str, Tensor]:
    """S [n, n] of each group, of the tensors in which it stands on one axis; kept up to date by what changed.

    Correcting a tensor whose neighbour changed at m of n entries costs m/n of building its term (of both the old and
    the new columns, one product); where that saves nothing, or rounding could pile up, all terms are built anew, those
    of all such groups at once.
    """
    current = {group: _gathers(descent, descent.around[group].single) for group in groups}
    anew = [group for group in groups if not _worth_correcting(descent, group, current[group])]
    terms = [_terms(descent, descent.around[g].single, 0, descent.steps, current[g]) for g in anew]
    built = similarity_many([t for t in terms if t], backend=descent.backend) if any(terms) else []
    for group, own in zip(anew, terms, strict=True):
        n = descent.spec.groups[group]
        total = built.pop(0) if own else next(iter(descent.target.values())).new_zeros(n, n)
        descent.cached[group] = _Cached(total, descent.steps, current[group])
    for group in groups:
        if group not in anew:
            _correct_(descent, group, current[group])
    return {group: descent.cached[group].similarity for group in groups}


def _correct_(descent: Descent, group: str, current: Gathers) -> None:
    """Bring a group's similarity up to date: first for changed neighbours over the old steps, then for new steps."""
    cached, places = descent.cached[group], descent.around[group].single
    for place in places:
        for other in place.others:
            old, new = cached.indices[place.name, other], current[place.name, other]
            if torch.equal(old, new):
                continue
            (term,) = _terms(descent, [place], 0, cached.steps, cached.indices)
            similarity_update_(cached.similarity, term, other, old, new, backend=descent.backend)
            cached.indices[place.name, other] = new
            cached.corrections += 1
    if cached.steps < descent.steps:
        terms = _terms(descent, places, cached.steps, descent.steps, current)
        cached.similarity += similarity(terms, backend=descent.backend)
        cached.steps = descent.steps


def _worth_correcting(descent: Descent, group: str, current: Gathers) -> bool:
    cached, places = descent.cached.get(group), descent.around[group].single
    if cached is None or not places:
        return False
    if cached.corrections >= CORRECTIONS_BEFORE_REBUILD and cached.similarity.dtype != torch.float64:
        return False
    whole = correct = 0.0
    for place in places:
        work = descent.target[place.name][0].numel()
        whole += work * descent.steps
        correct += work * (descent.steps - cached.steps)
        for other in place.others:
            old, new = cached.indices[place.name, other], current[place.name, other]
            correct += work * cached.steps * _changed_share(old, new)
    return correct < WORTH_CORRECTING * whole


def _gathers(descent: Descent, places: Sequence[_Place]) -> Gathers:
    """What the current permutation means for the other axes of each place's tensor."""
    return {
        (place.name, other): descent.spec.axis_index(place.name, other, descent.perm)
        for place in places
        for other in place.others
    }


def _terms(descent: Descent, places: Sequence[_Place], first: int, last: int, gathers: Gathers) -> list[Term]:
    """The places' terms over the steps first .. last - 1, the source's other axes gathered."""
    return [
        Term(
            target=descent.target[place.name][first:last],
            source=descent.source[place.name][first:last],
            axis=place.axis,
            positions=place.positions,
            gathers=tuple(
                gathers[place.name, axis] if axis in place.others else None
                for axis in range(len(descent.spec.shapes[place.name]))
            ),
        )
        for place in places
    ]


def _coupled_similarity(descent: Descent, group: str) -> Tensor | None:
    """S of the tensors in which `group` stands on several axes: the objective's gradient at the current permutation."""
    places = descent.around[group].coupled
    if not places:
        return None
    terms = _terms(descent, places, 0, descent.steps, _gathers(descent, places))
    return similarity(terms, backend=descent.backend)


def _coupled_objective(descent: Descent, group: str, candidate: Tensor) -> float:
    names = sorted({place.name for place in descent.around[group].coupled})
    return _objective(descent, names, {**descent.perm, group: candidate}, 0)


def _objective(descent: Descent, names: Iterable[str], perm: Perm, first: int) -> float:
    """sum over the filled steps from `first` on of <G2[t], pi G1[t]> of the named tensors, in float64."""
    total = 0.0
    for name in names:
        target, source = (side[name][first : descent.steps] for side in (descent.target, descent.source))
        for axis in range(len(descent.spec.shapes[name])):
            index = descent.spec.axis_index(name, axis, perm)
            if index is not None and not _is_identity(index):
                source = source.index_select(axis + 1, index)
        total += float((target * source).sum(dtype=torch.float64))
    return total


def _collected(similarity: Tensor, perm: Tensor) -> float:
    """sum_i S[i, perm[i]] in float64."""
    return float(similarity.gather(1, perm[:, None]).sum(dtype=torch.float64))


def _neighbourhood(spec: PermutationSpec, group: str, names: frozenset[str], perm: Perm) -> _Neighbourhood:
    places = [_place(spec, name, axis, group, perm) for name, axis in spec.tensors_of(group) if name in names]
    count = Counter(place.name for place in places)
    single = tuple(place for place in places if count[place.name] == 1)
    coupled = tuple(place for place in places if count[place.name] > 1)
    neighbours = tuple(
        other
        for other in spec.groups
        if (other != group or coupled) and any(name in count for name, _ in spec.tensors_of(other))
    )
    return _Neighbourhood(single, coupled, neighbours)


def _place(spec: PermutationSpec, name: str, axis: int, group: str, perm: Perm) -> _Place:
    shape, positions = spec.shapes[name], spec.positions(name, axis, group)
    moving = [a for a in range(len(shape)) if spec.axis_index(name, a, perm) is not None]
    in_order = positions.shape == (shape[axis], 1) and _is_identity(positions)
    others = tuple(other for other in moving if other != axis)
    return _Place(name, axis, others, None if in_order else positions.to(perm[group].device))


def _stacked(spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> Tensors:
    """The floating tensors as detached stacks [T, *shape]; a single set becomes a stack of one (a view)."""
    stacks = {}
    for name, tensor in tensors.items():
        if name not in spec.shapes:
            raise ValueError(f"the spec has no tensor {name!r}")
        shape, found = spec.shapes[name], tuple(tensor.shape)
        if shape not in (found, found[1:]):
            raise ValueError(f"tensor {name!r} has shape {found}, neither {shape} nor a stack of them")
        if tensor.is_floating_point():
            stacks[name] = tensor.detach()[None] if found == shape else tensor.detach()
    if not stacks:
        raise ValueError("there is nothing to match: no floating-point tensor")
    return stacks


def _steps(stacks: Tensors) -> int:
    first, *others = stacks
    steps = len(stacks[first])
    for name in others:
        if len(stacks[name]) != steps:
            raise ValueError(f"tensor {name!r} has {len(stacks[name])} steps, {first!r} has {steps}")
    return steps


def _empty_stack(like: Tensor, capacity: int) -> Tensor:
    """Room for [capacity, *shape], the second axis innermost: then both of the axes that units stand on unfold
    into matrices without a copy, whatever the size of the kernel between them."""
    if like.dim() < 3:
        return like.new_empty(capacity, *like.shape)
    rows, columns, *tail = like.shape
    return like.new_empty(capacity, rows, *tail, columns).movedim(-1, 2)


def _changed_share(old: Tensor, new: Tensor) -> float:
    return 0.0 if old is new else float((old != new).float().mean())


def _is_identity(index: Tensor) -> bool:
    flat = index.reshape(-1)
    return torch.equal(flat, torch.arange(len(flat), device=flat.device))

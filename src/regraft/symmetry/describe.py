"""What the command says about a model's symmetry."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.models import by_name
from regraft.symmetry.spec import PermutationSpec, parameters_moved
from regraft.symmetry.trace import trace
from regraft.symmetry.verify import verify


def describe(name: str, shape: Sequence[int] | None = None) -> PermutationSpec:
    """What ``regraft symmetry NAME`` does: traces a model, prints its groups, and proves them.

    ``name`` and ``shape`` are those of :func:`regraft.models.by_name`.
    Raises ValueError for a model that cannot be found, called, traced or proved.
    """
    from rich.console import Console

    named = by_name(name, shape)
    console = Console()
    with console.status(f"tracing {name}"):
        spec = trace(named.model, named.inputs)
    console.print(spec.table())
    with console.status(f"proving {name}"):
        error = verify(spec, named.model, named.inputs)
    console.print(
        f"{name}: proved, relative error {error:.1e} in float64; "
        f"a random permutation moves {parameters_moved(spec, named.model):.1%} of the parameters"
    )
    return spec

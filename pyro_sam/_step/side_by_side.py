"""Replicas one after the other, each in the ordinary way: what runs where they cannot run as one, and what is right."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.replicas import check_parameters
from pyro_sam._step import checks
from pyro_sam._step.memory import Average, Layout
from pyro_sam._step.ordinary import OrdinaryPasses, OrdinaryRan
from pyro_sam._step.passes import Dependence, Loss, Passes, Ran


class SideBySide(Passes):
    """The passes of one step of several guides; a row of noise is a guide's.

    Args:
        members: The ordinary passes of each.
    Attributes:
        rows: Whether what torch would have checked holds, per guide; one entry a run.
    """

    def __init__(self, members: Sequence[OrdinaryPasses]) -> None:
        self.members = members
        self.rows: list[Tensor] = []

    @property
    def num_particles(self) -> int:
        """Number of guides."""
        return len(self.members)

    def layout(self) -> Layout:
        """Return the perturbed sites."""
        one = self.members[0].layout()
        shapes = tuple(torch.Size((len(self.members), *shape)) for shape in one.shapes)
        return Layout(one.names, shapes, len(self.members))

    def group_sizes(self) -> Sequence[int]:
        """Return for each site the number of noise scalars of one batch element."""
        return self.members[0].group_sizes()

    def zeros(self) -> Tensor:
        """Return the noise of the guides' means."""
        return torch.cat([member.zeros() for member in self.members])

    def gaussian(self) -> Tensor:
        """Draw standard normal noise."""
        return torch.randn_like(self.zeros())

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations."""
        locs, scales = zip(*[member.loc_and_scale() for member in self.members], strict=True)
        return torch.cat(locs), torch.cat(scales)

    def ascend(self, e: Tensor) -> "RanSideBySide":
        """Run guides and model at a chosen noise, without a trace."""
        call = checks.ByRow()
        ran = [call(member.ascend, e[r : r + 1]) for r, member in enumerate(self.members)]
        self._note(call)
        return RanSideBySide(ran)

    def descend(self, e: Tensor, *, detach_scale: bool = False, average: Average | None = None) -> "RanSideBySide":
        """Run guides and model at a chosen noise; buffers keep what the model writes, which must be the same for all.

        Raises:
            ValueError: If it is not.
        """
        call, ran, written = checks.ByRow(), [], []
        for r, member in enumerate(self.members):
            part = None if average is None else average.row(r)
            is_last = r == len(self.members) - 1  # a run of its own would write once
            with kept_buffers(member.modules, on_error_only=is_last) as buffers:
                ran.append(call(member.descend, e[r : r + 1], detach_scale=detach_scale, average=part))
                written.append(buffers.now())
                _check_same(written[0], written[-1])
                nodes: Any = ran[-1].model.nodes.items()
                check_parameters([name for name, site in nodes if site["type"] == "param"])
        self._note(call)
        return RanSideBySide(ran)

    def kl_at(self, e: Tensor, there: Ran, *, with_model: bool) -> Loss:
        """Return the KLs' estimates at other noise."""
        each = zip(self.members, e.split(1), there.members, strict=True)  # type: ignore[attr-defined]
        return _stack([member.kl_at(row, ran, with_model=with_model) for member, row, ran in each], e)

    def check(self, e: Tensor | None) -> None:
        """Run guides and model under torch's own checks, which raise; see :meth:`OrdinaryPasses.check`."""
        for r, member in enumerate(self.members):
            member.check(None if e is None else e[r : r + 1])

    def _note(self, call: checks.ByRow) -> None:
        if (rows := call.rows()) is not None:
            self.rows.append(rows)


class RanSideBySide(Ran):
    """What came of a run of each.

    Args:
        members: The runs.
    """

    def __init__(self, members: Sequence[OrdinaryRan]) -> None:
        self.members = members
        self.data_loss = _stack([ran.data_loss for ran in members])

    def gradients(self) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the gradients in the noise and in the values."""
        in_noise, in_values = zip(*[ran.gradients() for ran in self.members], strict=True)
        return torch.cat(in_noise), [torch.stack(each) for each in zip(*in_values, strict=True)]

    def displacements(self) -> Sequence[Tensor]:
        """Return the Gaussian values less their loc, with the graph to scale."""
        return [torch.stack(each) for each in zip(*[ran.displacements() for ran in self.members], strict=True)]

    def kl(self) -> Loss:
        """Return the KLs, or their estimates at this run's values."""
        return _stack([ran.kl() for ran in self.members], self.data_loss)

    def sees_noise(self, kl: Loss) -> Dependence:
        """Return what depends on the noise in any of the runs."""
        seen = [ran.sees_noise(ran.kl()) for ran in self.members]
        return Dependence(kl=any(each.kl for each in seen), prior=any(each.prior for each in seen))


def _check_same(first: Mapping[Any, Tensor | None], other: Mapping[Any, Tensor | None]) -> None:
    for key, buffer in first.items():
        value = other.get(key)
        if (buffer is None) != (value is None) or (
            buffer is not None and value is not None and not torch.equal(buffer, value)
        ):
            module, name = key
            raise ValueError(
                f"{type(module).__name__} writes to its buffer '{name}' what differs from replica to replica, which "
                "have one buffer together. Switch that off, or train without num_replicas."
            )


def _stack(losses: Sequence[Loss], like: Loss = 0.0) -> Tensor:
    like = next((loss for loss in losses if isinstance(loss, Tensor)), torch.as_tensor(like))
    return torch.stack([loss if isinstance(loss, Tensor) else like.new_tensor(loss) for loss in losses])

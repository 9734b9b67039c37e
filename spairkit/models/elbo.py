"""The training objective as named terms (docs/model.md 5)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Losses:
    """Terms of the negative ELBO of each image, in nats, and its number of objects; all [B].

    A term that the model does not have is None.
    """

    reconstruction: Tensor
    """-log p(image | latents), summed over pixels and channels."""
    kl_where: Tensor
    """Place and size; like what and depth weighted by the presence of the object."""
    kl_what: Tensor
    kl_depth: Tensor | None = None
    kl_pres: Tensor | None = None
    """z_pres under the count prior; never multiplied by `beta` or by presence."""
    found: Tensor | None = None
    """Number of objects: those of a presence probability above 1/2. Not a term; None if given."""
    beta: float = 1.0
    """Weight of the where, what and depth terms in `total`; 1 makes it the negative ELBO."""

    @property
    def elbo(self) -> Tensor:  # [B]
        """Minus the sum of the unweighted terms, with one sample; higher is better.

        The evidence lower bound where samples are exact. With relaxed z_pres (SPAIR in training and
        validation) it approximates the bound.
        """
        return -sum(self.terms().values(), start=torch.zeros_like(self.reconstruction))

    @property
    def total(self) -> Tensor:  # [B]
        """The training loss: the negative ELBO with `beta` on where, what and depth."""
        weighted = self.kl_where + self.kl_what
        if self.kl_depth is not None:
            weighted = weighted + self.kl_depth
        total = self.reconstruction + self.beta * weighted
        return total if self.kl_pres is None else total + self.kl_pres

    def terms(self) -> dict[str, Tensor]:
        """The terms that the model has, by name."""
        names = ("reconstruction", "kl_where", "kl_what", "kl_depth", "kl_pres")
        return {name: term for name in names if (term := getattr(self, name)) is not None}

    def detach(self) -> "Losses":
        """The same without autograd's record."""
        terms: dict[str, Any] = {name: term.detach() for name, term in self.terms().items()}
        return replace(self, **terms)

    def means(self) -> dict[str, Tensor]:
        """Name to batch mean (0-d, detached) of every term, of `total`, `elbo` and `found`."""
        every = {**self.terms(), "total": self.total, "elbo": self.elbo}
        if self.found is not None:
            every["found"] = self.found
        return {name: value.detach().mean() for name, value in every.items()}

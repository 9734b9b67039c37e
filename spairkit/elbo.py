"""The training objective as named terms (spec section 5)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Losses:
    """Terms of the negative ELBO of each image, in nats; every term [B]."""

    reconstruction: Tensor
    """-log p(image | latents), summed over pixels and three channels."""
    kl_where: Tensor
    """z_y, z_x, z_h and z_w; like what and depth weighted by the presence of its cell."""
    kl_what: Tensor
    kl_depth: Tensor
    kl_pres: Tensor
    """z_pres under the count prior; in no way weighted."""
    beta: float = 1.0
    """Weight of the where, what and depth terms in `total`; 1 makes it the negative ELBO."""

    @property
    def elbo(self) -> Tensor:  # [B]
        """The evidence lower bound with one sample: the higher, the better the model."""
        return -(self.reconstruction + self.kl_where + self.kl_what + self.kl_depth + self.kl_pres)

    @property
    def total(self) -> Tensor:  # [B]
        """What training minimises, averaged over the batch."""
        weighted = self.kl_where + self.kl_what + self.kl_depth
        return self.reconstruction + self.beta * weighted + self.kl_pres

    def means(self) -> dict[str, Tensor]:
        """Name to batch mean (0-d, detached) of every term, of `total` and of `elbo`."""
        names = ("reconstruction", "kl_where", "kl_what", "kl_depth", "kl_pres", "total", "elbo")
        return {name: getattr(self, name).detach().mean() for name in names}

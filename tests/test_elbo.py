"""Weights of the terms in the training objective and in the reported ELBO."""

from dataclasses import replace

import pytest
import torch

from spairkit.models.elbo import Losses

TERMS = {
    "reconstruction": [100.0, 300.0],
    "kl_where": [1.0, 3.0],
    "kl_what": [10.0, 30.0],
    "kl_depth": [2.0, 6.0],
    "kl_pres": [4.0, 8.0],
}


def losses(beta: float) -> Losses:
    terms = {name: torch.tensor(values, requires_grad=True) for name, values in TERMS.items()}
    return Losses(**terms, beta=beta)


def test_beta_weights_only_where_what_and_depth() -> None:
    assert losses(1.0).total.tolist() == [117.0, 347.0]
    assert losses(3.0).total.tolist() == [143.0, 425.0]


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_elbo_is_unweighted(beta: float) -> None:
    assert losses(beta).elbo.tolist() == [-117.0, -347.0]


def test_means_list_every_term_without_gradients() -> None:
    means = losses(3.0).means()
    assert {name: float(value) for name, value in means.items()} == {
        "reconstruction": 200.0,
        "kl_where": 2.0,
        "kl_what": 20.0,
        "kl_depth": 4.0,
        "kl_pres": 6.0,
        "total": 284.0,
        "elbo": -232.0,
    }
    assert not any(value.requires_grad for value in means.values())


def test_number_of_objects_is_no_term() -> None:
    counted = replace(losses(1.0), found=torch.tensor([3.0, 4.0]))
    assert torch.equal(counted.total, losses(1.0).total)
    assert float(counted.means()["found"]) == 3.5
    assert float(counted.detach().means()["found"]) == 3.5


def test_absent_terms_are_omitted() -> None:
    names = ("reconstruction", "kl_where", "kl_what")
    few = Losses(**{name: torch.tensor(TERMS[name]) for name in names}, beta=1.0)
    assert few.total.tolist() == [111.0, 333.0]
    assert few.elbo.tolist() == [-111.0, -333.0]
    assert list(few.means()) == ["reconstruction", "kl_where", "kl_what", "total", "elbo"]

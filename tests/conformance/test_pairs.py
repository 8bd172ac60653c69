"""Over the table of pairs: the Gaussian law is Pyro's estimator; a law of radius zero is the law it starts from."""

from typing import Any

import pyro
import pytest
import torch
from oracles import gradients_of
from pairs import PAIRS, Pair

import pyro_sam as ps


def assert_same(first: tuple[float, dict[str, Any]], second: tuple[float, dict[str, Any]]) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-12, abs=1e-12)
    assert first[1].keys() == second[1].keys()
    for name, gradient in second[1].items():
        torch.testing.assert_close(first[1][name], gradient, rtol=1e-10, atol=1e-12)


def result(elbo: Any, build: tuple[Any, Any]) -> tuple[float, dict[str, Any]]:
    pyro.set_rng_seed(2)
    return gradients_of(elbo, *build)


MODES: list[dict[str, Any]] = [
    {"num_particles": 1},
    {"num_particles": 2},
    {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_gaussian_law_is_pyros_estimator(pair: Pair) -> None:
    build = pair.build()
    for mode in MODES:
        expected = result(pair.reference(**mode), build)
        assert any(gradient.any() for gradient in expected[1].values())
        assert_same(result(ps.SAM_ELBO(ps.Gaussian(), **mode), build), expected)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_radius_zero_is_the_law_it_starts_from(pair: Pair) -> None:
    build = pair.build()
    for law, start in ((ps.Adversarial(0.0), ps.Mean()), (ps.AscendedSample(0.0), ps.Gaussian())):
        assert_same(result(ps.SAM_ELBO(law), build), result(ps.SAM_ELBO(start), build))


def test_table_is_as_large_as_promised() -> None:
    assert len({pair.name for pair in PAIRS}) == len(PAIRS) >= 40

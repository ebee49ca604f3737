"""Room Model: the vectors are those of the authors' own code, whatever shares a batch."""

from collections import defaultdict

import gme_service as gme
import numpy as np
import pytest
import torch
from conftest import TOY, Case, golden

CPU = torch.device("cpu")


def source(case: Case) -> gme.Source:
    return gme.Source(case.text, case.data, case.prompt or gme.DEFAULT_INSTRUCTION)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return golden()


@pytest.fixture(scope="module")
def inputs(cases: list[Case]) -> list[gme.Input]:
    return gme.Preparer(TOY, 1800, 10**8)([source(case) for case in cases])


@pytest.fixture(scope="module")
def model() -> gme.Model:
    return gme.Model(TOY, CPU, torch.float32)


def test_each_input_alone_has_the_authors_vector(model: gme.Model, inputs: list[gme.Input], cases: list[Case]) -> None:
    for case, one in zip(cases, inputs, strict=True):
        np.testing.assert_allclose(model.embed([one])[0], case.vector, atol=1e-5, err_msg=f"case {case.number}")

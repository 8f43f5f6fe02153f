"""Tensors of odd kinds give the right value or one error that names the argument."""

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops
from gvendi_fast.vendi import gvendi

ROWS = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
SAME = {
    "a negative view": torch.imag(torch.complex(torch.zeros_like(ROWS), -ROWS).conj()),
    "transposed": ROWS.T.contiguous().T,
    "every second column": torch.stack([ROWS, -ROWS], dim=2).reshape(40, 128)[:, ::2],
    "float64": ROWS.double(),
    "with a gradient": ROWS.clone().requires_grad_(),
    "swapped bytes": ROWS.numpy().astype(">f4"),
    "backwards": ROWS.numpy()[::-1],
}
WRONG = {
    "integers": ROWS.int(),
    "booleans": ROWS > 0,
    "complex": torch.complex(ROWS, ROWS).conj(),
    "sparse": ROWS.to_sparse(),
    "on no device": ROWS.to("meta"),
    "nested": torch.nested.nested_tensor([ROWS[0], ROWS[1]]),
    "no columns": ROWS[:, :0],
    "objects": np.array([[object()]]),
    "a list": ROWS.tolist(),
}


@pytest.mark.parametrize("rows", SAME.values(), ids=SAME)
def test_the_same_numbers_in_another_form_give_the_same_value(rows):
    assert gvendi(rows) == pytest.approx(gvendi(ROWS), rel=1e-6)


@pytest.mark.parametrize("rows", WRONG.values(), ids=WRONG)
def test_what_is_no_matrix_is_refused_by_name(rows):
    with pytest.raises(GvendiError, match=r"^rows "):
        gvendi(rows)


def test_a_kernel_refuses_a_view_whose_memory_has_the_other_sign():
    with pytest.raises(GvendiError, match="rows is a negative view"):
        ops.covariance(torch._neg_view(ROWS), torch.zeros(64, 64, dtype=torch.float64))

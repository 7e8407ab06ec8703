"""A tape frees what autograd frees, when it does."""

from __future__ import annotations

from longspan.plan.tape import Op, walk


def test_a_chain_by_hand() -> None:
    """x (10) -> y (20, saves x) -> z (5, saves y)."""
    ops = [Op(("x",), "y", 20, ("x",), weights=3), Op(("y",), "z", 5, ("y",))]
    found = walk(ops, {"x": 10})
    assert found.forward == 10 + 20 + 5
    assert found.saved == 10 + 20
    # x and y are saved, dz and dy alive; later x, dy, dx and the weight's gradient: 10 + 20 + 10 + 3.
    assert found.backward == 30 + 5 + 20
    assert found.weights == 3


def test_a_sum_hands_its_gradient_on() -> None:
    """Residual streams would otherwise be counted with a gradient for each branch."""
    branch = Op(("x",), "y", 10, ("x",))
    copied = walk([branch, Op(("x", "y"), "z", 10)], {"x": 10}).backward
    passed = walk([branch, Op(("x", "y"), "z", 10, passes=True)], {"x": 10}).backward
    assert (copied, passed) == (10 + 10 + 20, 10 + 10 + 10)


def test_what_is_not_saved_is_freed() -> None:
    """Scratch tensors of the forward pass are gone when the next operation runs."""
    ops = [Op(("x",), "y", 1, extra=(("wide", 100),)), Op(("y",), "z", 50)]
    found = walk(ops, {"x": 1})
    assert (found.forward, found.saved) == (102, 1)

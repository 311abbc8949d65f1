"""A key given twice in any mapping of a YAML file is refused."""

import pytest

from sparsekv_pl.cli.trainer_limits import check_limits
from sparsekv_pl.cli.yaml_limits import check_nodes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "key a stands twice, in lines 1 and 3"),
        ("trainer:\n  devices: 1\n  callbacks: []\n  devices: 2", "key devices stands twice, in lines 2 and 4"),
        ("list:\n- {x: 1}\n- y: 1\n  y: 2", "key y stands twice, in lines 3 and 4"),
    ],
)
def test_a_key_given_twice_is_named_with_its_lines(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_nodes(text)


@pytest.mark.parametrize("text", ["", "a", "[1, 2]", "a: {x: 1}\nb: {x: 1}", "a: &s {x: 1}\nb: *s\nc: {<<: *s, y: 2}"])
def test_the_same_key_elsewhere_is_none_twice(text: str) -> None:
    check_nodes(text)


@pytest.mark.parametrize(
    ("command", "trainer", "said"),
    [
        ("test", {"limit_test_batches": 0}, "limit_test_batches is 0, so test would do nothing"),
        ("predict", {"limit_predict_batches": 0.0}, "limit_predict_batches is 0, so predict would do nothing"),
        ("fit", {"min_epochs": 3, "max_epochs": 2}, "min_epochs is 3, above trainer.max_epochs, 2"),
    ],
)
def test_limits_that_leave_nothing_to_do_are_refused(command: str, trainer: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_limits(trainer, command)


def test_other_limits_are_not() -> None:
    check_limits({"min_steps": 5, "max_steps": -1, "limit_val_batches": 0, "limit_train_batches": None}, "fit")

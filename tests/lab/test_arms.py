"""What a person types after --methods, read as it is meant or refused with a reason."""

import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coloss import Budget, Method, Setting
from coloss.errors import InputError
from coloss.lab import Comparison, find_task
from coloss.lab import arms as reading
from coloss.lab.arms import check_parameters, parse_arm, read_value, split_arms
from coloss.train import Schedule


@pytest.fixture(scope="module")
def iris():
    return find_task("iris")


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("cross-entropy", []),
        ("trp", [{"slug": "trp", "parameters": {}}]),
        (" trp : energy = 0.8 : every=10", [{"slug": "trp", "parameters": {"energy": 0.8, "every": 10}}]),
        ("cross-entropy+trp", [{"slug": "trp", "parameters": {}}]),
        (
            "dhkd+trp:energy=1",
            [{"slug": "dhkd", "parameters": {}}, {"slug": "trp", "parameters": {"energy": 1}}],
        ),
        ("trp:nuclear_weight=1e+3", [{"slug": "trp", "parameters": {"nuclear_weight": 1000.0}}]),
        ("trp:decompose=False", [{"slug": "trp", "parameters": {"decompose": False}}]),
        ('trp:layers=["a.0","b"]', [{"slug": "trp", "parameters": {"layers": ["a.0", "b"]}}]),
        ("trp:layers=none", [{"slug": "trp", "parameters": {"layers": None}}]),
        (
            "dhkd:teacher=C:/models/a.safetensors",
            [{"slug": "dhkd", "parameters": {"teacher": "C:/models/a.safetensors"}}],
        ),
    ],
)
def test_arms_as_typed(iris, text, methods):
    record = parse_arm(text, iris)
    assert record.methods == methods and record.name == text.strip()


def test_a_method_of_ones_own_goes_by_its_import_path(iris, tmp_path, monkeypatch):
    (tmp_path / "shrinking.py").write_text(
        "import coloss\n"
        "class Shrink(coloss.Method):\n"
        "    def __init__(self, weight: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.term_weights = {'shrink': weight}\n"
        "    def terms(self, state):\n"
        "        return {'shrink': state.outputs.square().mean()}\n"
    )
    monkeypatch.chdir(tmp_path)
    record = parse_arm("shrinking:Shrink:weight=0.5+trp", iris)
    assert record.methods == [
        {"slug": "shrinking:Shrink", "parameters": {"weight": 0.5}},
        {"slug": "trp", "parameters": {}},
    ]
    found = Comparison(
        "iris", ["cross-entropy", "shrinking:Shrink:weight=1000"], seeds=1, budget=Budget(steps=30)
    )
    result = found.run(tmp_path / "out")
    terms = result.trials[1].history[-1].terms
    assert terms["shrink"] < 0.2 and set(terms) == {"cross_entropy", "shrink"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("coloss.jepa:VICRag", "module 'coloss.jepa' has no 'VICRag'; did you mean 'VICReg'"),
        (
            "coloss.jepa:rankme",
            "coloss.jepa:rankme must be a class derived from coloss.Method, got <function",
        ),
        ("no.such:Thing", "cannot import 'no.such' of 'no.such:Thing'"),
        ("coloss.jepa:VICReg:vews=3", "coloss.jepa:VICReg has no parameter 'vews'; did you mean 'views'"),
        ("trp:energy", "a parameter must look like name=value, got 'energy'"),
    ],
)
def test_import_paths_that_name_no_method(iris, text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_arm(text, iris)


def test_commas_within_values_do_not_part_arms():
    assert split_arms('a, b:x=[1,2] ,c:y="p,q"+d') == ["a", "b:x=[1,2]", 'c:y="p,q"+d']


@given(st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.none()))
def test_values_are_read_back(value):
    assert read_value(repr(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("NaN", "NaN"), ("Infinity", "Infinity"), ("spatial", "spatial"), ('"3"', "3"), ("", "")],
)
def test_what_is_no_plain_value_stays_text(text, value):
    assert read_value(text) == value


class Everything(Method):
    """Takes one parameter of each sort."""

    def __init__(
        self,
        teacher: nn.Module | None = None,
        *,
        number: float = 1.0,
        count: int = 1,
        flag: bool = True,
        choice: Literal["a", "b"] = "a",
        weight: Schedule = 1.0,
        sizes: tuple[int, ...] = (),
        table: Tensor | None = None,
        anything=None,
    ):
        super().__init__()

    @classmethod
    def for_setting(cls, setting, *, teacher: str | None = None, **parameters):
        return cls(None, **parameters)


class Closed(Everything):
    """Passes nothing on to its constructor."""

    @classmethod
    def for_setting(cls, setting, number: float = 1.0):
        return cls(number=number)


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.setattr(
        reading, "method_class", lambda slug: {"everything": Everything, "closed": Closed}[slug]
    )


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("number", [1, 0.5, -2], ["x", True, [1], None]),
        ("count", [1, 0], [1.5, "1", True]),
        ("flag", [True, False], [1, "yes"]),
        ("choice", ["a", "b"], ["c", 1]),
        ("weight", [1, 0.5], ["x", [1]]),
        ("sizes", [[1, 2], []], [[0.5], "12"]),
        ("teacher", ["path", None], [3]),
        ("table", [None], [1.0, [1.0]]),
        ("anything", [1, "x", None, [1]], []),
    ],
)
def test_values_of_a_wrong_type_are_refused(everything, name, right, wrong):
    for value in right:
        check_parameters("everything", {name: value})
    for value in wrong:
        with pytest.raises(InputError, match=f"^{name} of everything must be .*, got "):
            check_parameters("everything", {name: value})


def test_only_what_for_setting_passes_on_is_a_parameter(everything):
    check_parameters("closed", {"number": 2.0})
    with pytest.raises(InputError, match=r"closed has no parameter 'count' \(it has: number\)"):
        check_parameters("closed", {"count": 2})
    with pytest.raises(InputError, match="everything has no parameter 'numbr'; did you mean 'number'"):
        check_parameters("everything", {"numbr": 2})


def test_an_error_of_a_constructor_is_bad_input(everything, iris):
    arm = reading.build_arm(
        reading.ArmRecord(name="x", methods=[{"slug": "closed", "parameters": {"numbr": 1}}])
    )
    setting = Setting(iris, 0, None, Budget(steps=1))
    with pytest.raises(InputError, match="unexpected keyword argument 'numbr'"):
        arm.methods(setting)


def test_a_system_that_does_not_act_in_training_is_no_arm(iris, monkeypatch):
    from coloss.lab.catalog import Entry

    entry = Entry("meter", "", "", "jepa", ("evaluation",), (), "", "")
    monkeypatch.setattr("coloss.lab.catalog.catalog", lambda: (entry,))
    monkeypatch.setattr(reading, "catalog", lambda: (entry,))
    with pytest.raises(
        InputError, match=r"meter does not act during training, so it cannot be an arm \(coloss show meter\)"
    ):
        parse_arm("meter", iris)

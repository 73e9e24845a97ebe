import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import check_resume
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import coloss
from coloss import Budget
from coloss.data import Batch, IndexedDataset
from coloss.distillation import TeacherLogits
from coloss.errors import InputError
from coloss.nn import MLP, Frozen
from coloss.retrieval import EmbeddingTargets
from coloss.train import (
    Method,
    SeededAugmentation,
    State,
    TeacherTable,
    cache_teacher,
    input_sketch,
    teacher_fingerprint,
    teacher_table,
)


def new_teacher(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MLP(6, [8], 4, dropout=0.5)


def new_data(rows: int = 12, seed: int = 0) -> IndexedDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=generator)
    return IndexedDataset(inputs, torch.arange(rows) % 4, ids=torch.randperm(50, generator=generator)[:rows])


def some(data: IndexedDataset, *positions: int) -> Batch:
    return data.take(torch.tensor(positions))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_what_the_teacher_says_of_each_sample(
    stored: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    data, teacher = new_data(), new_teacher().train()
    table = cache_teacher(
        teacher, data, tmp_path / "t.safetensors" if stored else None, taps=["layers.0"], dtype=dtype
    )
    assert all(module.training for module in teacher.modules())
    assert not any(module._forward_hooks for module in teacher.modules())
    assert table.ids.tolist() == sorted(data.ids.tolist())
    batch, teacher = some(data, 7, 3, 3), teacher.eval()
    exact = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
    for name, network in (("", teacher), ("layers.0", teacher.layers[0])):
        found = table.rows(batch, name)
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, network(batch.inputs), **(exact | {"atol": 1e-6 + exact["atol"]}))
    assert table.shape() == (4,) and table.names == ("", "layers.0")


def test_ids_may_be_large_or_negative() -> None:
    data = IndexedDataset(torch.eye(3), ids=[10**15, -4, 7])
    table = cache_teacher(nn.Linear(3, 2), data)
    assert len(table) == 3
    torch.testing.assert_close(table.rows(some(data, 1)), table.rows(some(data, 0, 1))[1:])
    with pytest.raises(InputError, match="a dense table needs ids >= 0"):
        table.dense()


def test_an_absent_row_never_passes_as_numbers() -> None:
    data = IndexedDataset(torch.randn(3, 6), ids=[2, 5, 9])
    table = cache_teacher(new_teacher(), data)
    for ids, message in (
        ([2, 4, 5], "teacher outputs must have a row of every sample, got none for id 4"),
        ([2, 10, 5], "a row for every sample id, got 3 rows and ids from 2 to 10"),
        ([-1, 2, 5], "got 3 rows and ids from -1 to 5"),
    ):
        with pytest.raises(InputError, match=message):
            table.rows(replace(data.all(), ids=torch.tensor(ids)))
    with pytest.raises(InputError, match="looked up by sample id, and the batch has none"):
        table.rows(Batch(data.inputs))
    dense = table.dense()
    assert dense.shape == (10, 4) and bool(dense[[0, 1, 3, 4, 6, 7, 8]].isnan().all())
    with pytest.raises(InputError, match="must have a row of every sample, got none for id 4"):
        TeacherTable.of(dense).rows(Batch(None, ids=torch.tensor([2, 4])))


def noisy(inputs: Tensor) -> Tensor:
    return inputs + 0.1 * torch.randn_like(inputs)


@pytest.mark.parametrize(
    "change", [noisy, lambda x: x.flip(1), lambda x: x.roll(1, 0), lambda x: x * 1.05, torch.zeros_like]
)
def test_inputs_that_the_teacher_did_not_see_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    data = new_data()
    table = cache_teacher(new_teacher(), data)
    with pytest.raises(InputError, match="the inputs of sample [0-9]+ are not those that the teacher saw"):
        table.rows(replace(data.all(), inputs=change(data.inputs)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_in_another_precision_are_the_same_inputs(dtype: torch.dtype) -> None:
    data = new_data()
    table, batch = cache_teacher(new_teacher(), data), data.all()
    changed = replace(batch, inputs=batch.inputs.to(dtype))
    torch.testing.assert_close(table.rows(changed), table.rows(batch))


def test_a_method_that_changes_the_inputs_is_found_out_in_a_run() -> None:
    class Noise(Method):
        def on_batch(self, state: State) -> None:
            state.batch = replace(state.batch, inputs=noisy(state.batch.inputs))

    class Learn(Method):
        def __init__(self, table: TeacherTable) -> None:
            super().__init__()
            self.teacher = TeacherLogits(table=table)

        def terms(self, state: State) -> dict[str, Tensor]:
            return {"learn": F.mse_loss(state.outputs, self.teacher(state.batch))}

    data = new_data()
    table = cache_teacher(new_teacher(), data)
    coloss.fit(new_teacher(1), data, methods=[Learn(table)], budget=Budget(steps=2))
    with pytest.raises(InputError, match="the inputs of sample .* than teacher_logits were made with"):
        coloss.fit(new_teacher(1), data, methods=[Noise(), Learn(table)], budget=Budget(steps=2))


def test_one_token_of_many_and_what_is_not_finite_are_seen_in_a_sketch() -> None:
    ids = torch.randint(50_000, (2, 64))
    other = ids.clone()
    other[1, 17] += 1
    gap = (input_sketch(ids)[0] - input_sketch(other)[0]).abs().amax((1, 2))
    assert gap[0] == 0 and gap[1] > 0.01
    holes = torch.tensor([[1.0, torch.nan, torch.inf, 2.0]])
    assert bool(input_sketch(holes)[0].isfinite().all())
    large, size = input_sketch(torch.full((1, 4), 1e30))
    assert bool(large.isfinite().all()) and size.item() == pytest.approx(30 * math.log(10))
    nested, _ = input_sketch({"a": ids, "b": torch.ones(2, 3)})
    assert nested.shape == (2, 2, 8)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"teacher": new_teacher(1)}, "teacher [0-9a-f]{12} stored, [0-9a-f]{12} wanted$"),
        ({"dataset": new_data(seed=1)}, "data [0-9a-f]{12} stored, [0-9a-f]{12} wanted$"),
        ({"augmentation_seed": 3}, "augmentation seed none stored, 3 wanted$"),
        ({"versions": 4, "augmentation_seed": 3}, "seed none stored, 3 wanted; versions 1 stored, 4 wanted$"),
        ({"dtype": torch.float16}, "type torch.float32 stored, torch.float16 wanted$"),
        ({"names": ["", "layers.0"]}, "output stored, layers.0 wanted$"),
    ],
)
def test_what_was_made_of_something_else_is_refused_in_one_line(asked: dict[str, Any], message: str) -> None:
    data, teacher = new_data(), new_teacher()
    table = cache_teacher(Frozen(teacher), data)
    assert table.require(teacher=teacher, dataset=data, augmentation_seed="none", versions=1) is table
    with pytest.raises(InputError, match=f"^the teacher outputs in memory do not apply: .*{message}"):
        table.require(**asked)
    with pytest.raises(InputError, match="teacher unknown stored"):
        TeacherTable.of(torch.zeros(3, 2)).require(teacher=teacher)


def test_a_file_is_made_once_and_refused_for_another_teacher(tmp_path: Path) -> None:
    path, data, passes = tmp_path / "deep" / "table.safetensors", new_data(), []
    teacher = new_teacher()
    teacher.register_forward_hook(lambda *_: passes.append(1))
    first = cache_teacher(teacher, data, path)
    made = len(passes)
    again = cache_teacher(teacher, data, path)
    assert made == 1 and len(passes) == 2  # one batch is compared
    batch = some(data, 4, 1)
    assert torch.equal(first.rows(batch), again.rows(batch))
    with pytest.raises(InputError, match=r"table.safetensors do not apply: teacher .* stored, .* wanted"):
        cache_teacher(new_teacher(1), data, path)
    with pytest.raises(InputError, match="data .* stored"):
        cache_teacher(teacher, new_data(seed=2), path)
    with pytest.raises(InputError, match="augmentation seed none stored, 0 wanted"):
        cache_teacher(teacher, data, path, augmentation=SeededAugmentation(data))
    assert list(path.parent.iterdir()) == [path]


def edited(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(bytes(content))


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def relabelled(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["coloss_teacher_table"])
    values["provenance"]["augmentation_seed"] = 7
    save_file(load_file(path), path, metadata={"coloss_teacher_table": json.dumps(values)})


@pytest.mark.parametrize(
    "damage", [lambda path: edited(path, 1.0), lambda path: edited(path, 0.7), shortened, relabelled]
)
def test_a_truncated_or_altered_file_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    cache_teacher(new_teacher(), new_data(), path)
    damage(path)
    with pytest.raises(InputError, match=r"cannot read the teacher outputs .* delete the file and make them"):
        TeacherTable.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    with pytest.raises(InputError, match="cannot read the teacher outputs"):
        TeacherTable.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="holds no teacher outputs"):
        TeacherTable.load(path)
    save_file({"/ids": torch.zeros(2)}, path, metadata={"coloss_teacher_table": '{"format": 9}'})
    with pytest.raises(InputError, match="has format 9, this version of coloss reads 2"):
        TeacherTable.load(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        cache_teacher(new_teacher(), new_data()).save(tmp_path / "file" / "table.safetensors")


def test_a_copy_is_the_same_table_and_a_file_travels_by_its_name(tmp_path: Path) -> None:
    data = new_data()
    table = cache_teacher(new_teacher(), data, tmp_path / "table.safetensors")
    assert copy.deepcopy(TeacherLogits(table=table)).table is table
    travelled = pickle.loads(pickle.dumps(table))  # noqa: S301
    assert len(pickle.dumps(table)) < 500 and torch.equal(travelled.rows(data.all()), table.rows(data.all()))


class Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: Tensor) -> Tensor:
        return self.value[: len(inputs)] if self.value.ndim else self.value


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (
            torch.tensor([[0.0], [torch.nan]]),
            torch.float32,
            "must be numbers that fit torch.float32, .* id 5",
        ),
        (torch.tensor([[0.0], [1e9]]), torch.float16, "must be numbers that fit torch.float16, .* id 5"),
        (torch.zeros(2), torch.float32, "two dimensions or more"),
        (torch.zeros(2, 1).long(), torch.float32, "a float tensor with one row"),
        (torch.zeros(1, 2), torch.float32, r"one row for each of 2 samples, got \(1, 2\)"),
        (torch.zeros(2, 1), torch.int32, "dtype must be torch.float32 or torch.float16, got torch.int32"),
    ],
)
def test_outputs_that_cannot_be_stored_are_named(value: Tensor, dtype: torch.dtype, message: str) -> None:
    data = IndexedDataset(torch.zeros(2, 1), ids=[3, 5])
    with pytest.raises(InputError, match=message):
        cache_teacher(Constant(value), data, dtype=dtype)
    with pytest.raises(InputError, match="taps must name modules of the teacher: .*'nowhere'"):
        cache_teacher(new_teacher(), new_data(), taps=["nowhere"])


def test_a_class_that_cannot_occur_is_kept() -> None:
    logits = torch.tensor([[0.0, -torch.inf]])
    data = IndexedDataset(torch.zeros(1, 1))
    assert torch.equal(cache_teacher(Constant(logits), data, dtype=torch.float16).rows(data.all()), logits)


def test_the_fingerprint_sees_weights_names_buffers_and_types() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2))
    found = {teacher_fingerprint(network), teacher_fingerprint(nn.Sequential(nn.Identity(), network[0]))}
    network(torch.randn(4, 2))
    found |= {teacher_fingerprint(network), teacher_fingerprint(network.double())}
    assert len(found) == 4
    assert teacher_fingerprint(Frozen(network)) == teacher_fingerprint(network)


def test_embeddings_of_system_bt2_stand_on_the_same_table() -> None:
    data, encoder = new_data(), new_teacher()
    targets = EmbeddingTargets(cache_teacher(encoder, data), "old")
    torch.testing.assert_close(targets(data.all()), encoder.eval()(data.inputs))
    assert targets.dim == 4
    with pytest.raises(InputError, match="the inputs of sample .* than old were made with"):
        targets(replace(data.all(), inputs=noisy(data.inputs)))


def flipped(inputs: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, (len(inputs), 1), generator=generator) * 2 - 1
    return (inputs * signs)[None]


class Keep(Method):
    """Keeps what each batch showed."""

    def __init__(self, table: TeacherTable | None = None) -> None:
        super().__init__()
        self.table, self.shown = table, []

    def on_batch(self, state: State) -> None:
        batch = state.batch
        rows = None if self.table is None else self.table.rows(batch)
        self.shown.append((state.epoch, batch.ids, batch.inputs, rows))


def run(data: IndexedDataset, methods: list[Method], **options: Any) -> None:
    coloss.fit(
        nn.Linear(6, 4), data, F.cross_entropy, methods, budget=Budget(epochs=4), batch_size=4, **options
    )


def test_teacher_and_student_see_the_same_view_of_each_epoch(tmp_path: Path) -> None:
    data, teacher = new_data(), new_teacher().eval()
    augmentation = SeededAugmentation(data, flipped, seed=5, versions=2)
    table = cache_teacher(teacher, data, tmp_path / "t.safetensors", augmentation=augmentation)
    keep = Keep(table)
    run(data, [SeededAugmentation(data, flipped, seed=5, versions=2), keep], seed=3)
    assert len(keep.shown) == 12
    for _, _, inputs, rows in keep.shown:
        torch.testing.assert_close(rows, teacher(inputs))
    shown = [
        {int(i): x for e, ids, xs, _ in keep.shown if e == epoch for i, x in zip(ids, xs)}
        for epoch in range(4)
    ]
    assert all(
        torch.equal(shown[0][i], shown[2][i]) and torch.equal(shown[1][i], shown[3][i]) for i in shown[0]
    )
    assert any(not torch.equal(shown[0][i], shown[1][i]) for i in shown[0])


def test_views_do_not_depend_on_the_order_of_the_batches() -> None:
    data, seen = new_data(), []
    for seed in (0, 1):
        keep = Keep()
        run(data, [SeededAugmentation(data, flipped, seed=5), keep], seed=seed)
        seen.append({(e, int(i)): x for e, ids, xs, _ in keep.shown for i, x in zip(ids, xs)})
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])


def test_a_run_that_augments_otherwise_than_the_table_says_is_refused() -> None:
    data, teacher = new_data(), new_teacher()
    augmented = cache_teacher(teacher, data, augmentation=SeededAugmentation(data, flipped, seed=5))
    plain = cache_teacher(teacher, data)
    with_seed = lambda seed, **more: SeededAugmentation(data, more.pop("view", flipped), seed=seed, **more)  # noqa: E731
    for table, methods, message in (
        (augmented, [with_seed(6)], "made with augmentation seed 5 and this run augments with seed 6"),
        (augmented, [], "made with augmentation seed 5 and this run does not augment"),
        (plain, [with_seed(5)], "made of inputs as they are and this run augments with seed 5"),
        (
            augmented,
            [with_seed(5, versions=3)],
            "hold 1 versions of each sample and this run shows 3",
        ),
        (augmented, [with_seed(5, view=lambda x, generator: x[None] * 2)], "not those that the teacher saw"),
    ):
        with pytest.raises(InputError, match=message):
            run(data, [*methods, Keep(table)])


def test_a_killed_run_with_seeded_views_resumes_bit_identically(tmp_path: Path) -> None:
    data = new_data(24)
    check_resume(
        lambda: nn.Linear(6, 4),
        lambda: SeededAugmentation(data, seed=1, versions=3),
        data,
        tmp_path,
        F.cross_entropy,
    )


def test_bad_augmentations_are_named() -> None:
    data = new_data()
    for options, message in (
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"versions": 0}, "versions must be >= 1"),
    ):
        with pytest.raises(InputError, match=message):
            SeededAugmentation(data, **options)
    with pytest.raises(InputError, match="must be given the data set of the run, got one without id"):
        run(new_data(seed=1), [SeededAugmentation(data)])
    with pytest.raises(InputError, match="must stand before other methods that make views"):
        run(data, [SeededAugmentation(data), SeededAugmentation(data)])
    with pytest.raises(InputError, match="augmentation must be of the same data set"):
        cache_teacher(new_teacher(), data, augmentation=SeededAugmentation(new_data(seed=1)))
    several = IndexedDataset((data.inputs, data.inputs))
    with pytest.raises(InputError, match="must be one tensor, got several"):
        SeededAugmentation(several).inputs(0)


def tabular(rows: int = 64) -> IndexedDataset:
    inputs = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = 50_000 + 1000 * inputs[:, 0]
    return IndexedDataset(inputs)


@pytest.mark.parametrize(
    "change", [lambda x: x.roll(1, 0), lambda x: x * 1.05, lambda x: torch.cat([x[:, :1], -x[:, 1:]], 1)]
)
def test_a_column_of_large_numbers_does_not_hide_the_others(change: Callable[[Tensor], Tensor]) -> None:
    data = tabular()
    table = cache_teacher(nn.Linear(6, 2), data)
    table.rows(replace(data.all(), inputs=data.inputs.bfloat16()))
    with pytest.raises(InputError, match="are not those that the teacher saw"):
        table.rows(replace(data.all(), inputs=change(data.inputs)))


def test_a_small_tensor_is_seen_beside_a_large_one() -> None:
    large, small = torch.randn(3, 5000), torch.randn(3, 2)
    (one, size), (other, _) = input_sketch((large, small)), input_sketch((large, -small))
    gap = (one - other).abs().amax(2) / size
    assert bool((gap[:, 0] == 0).all()) and bool((gap[:, 1] > 0.1).all())


class Named(nn.Module):
    """A network with a module that is called output, which gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(inputs).log_softmax(1)


def test_a_module_called_output_is_not_the_output() -> None:
    data, teacher = new_data(), Named()
    with pytest.raises(InputError, match="hold no 'output'"):
        cache_teacher(teacher, data).rows(data.all(), "output")
    table = cache_teacher(teacher, data, taps=["output"])
    torch.testing.assert_close(table.rows(data.all()), teacher(data.inputs))
    torch.testing.assert_close(table.rows(data.all(), "output"), teacher.output(data.inputs))


def test_a_file_of_a_teacher_of_other_code_or_type_or_view_is_refused(tmp_path: Path) -> None:
    data, first, last = new_data(), nn.Linear(6, 8), nn.Linear(8, 2)
    teacher, other = nn.Sequential(first, nn.ReLU(), last), nn.Sequential(first, nn.Tanh(), last)
    assert teacher_fingerprint(teacher) == teacher_fingerprint(other)
    for dtype in (torch.float16, torch.float32):
        path = tmp_path / f"{dtype}"
        cache_teacher(teacher, data, path, dtype=dtype)
        cache_teacher(teacher, data, path, dtype=dtype, batch_size=5)
        with pytest.raises(InputError, match="its output for the same samples is not: its code differs"):
            cache_teacher(other, data, path, dtype=dtype)
    with pytest.raises(InputError, match="type torch.float32 stored, torch.float16 wanted"):
        cache_teacher(teacher, data, path, dtype=torch.float16)
    seeded = lambda sign: SeededAugmentation(data, lambda x, generator: sign * x[None], seed=1)  # noqa: E731
    cache_teacher(teacher, data, tmp_path / "view", augmentation=seeded(1))
    cache_teacher(teacher, data, tmp_path / "view", augmentation=seeded(1))
    with pytest.raises(InputError, match="are not those that the teacher saw"):
        cache_teacher(teacher, data, tmp_path / "view", augmentation=seeded(-1))


class Stateful(nn.Linear):
    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra() if callable(self.extra) else self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_counts_where_it_is_plain() -> None:
    network, found = Stateful(2, 2), []
    for extra in ({"a": 1}, {"a": 2}, object, object):
        network.extra = extra
        found.append(teacher_fingerprint(network))
    assert len(set(found[:3])) == 3 and found[2] == found[3]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        return {"logits": self.head(inputs), "cache": None}


def test_the_output_of_a_teacher_that_gives_no_tensor_is_left_out(tmp_path: Path) -> None:
    data, teacher = new_data(), Nested()
    for _ in range(2):
        table = cache_teacher(teacher, data, tmp_path / "t", taps=["head"])
    assert table.names == ("head",)
    torch.testing.assert_close(table.rows(data.all(), "head"), teacher.head(data.inputs))
    with pytest.raises(InputError, match="the teacher's output must be a float tensor .* got dict"):
        cache_teacher(teacher, data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_table_of_any_float_type_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(3, 2).to(dtype)
    table = TeacherTable.load(TeacherTable.of(values).save(tmp_path / "t"))
    assert table.require(dtype=dtype) is table
    assert torch.equal(
        table.rows(Batch(None, ids=torch.arange(3))), values.to(torch.promote_types(dtype, torch.float32))
    )
    with pytest.raises(InputError, match="must be of type .* got torch.float8_e4m3fn"):
        TeacherTable.of(values.to(torch.float8_e4m3fn)).save(tmp_path / "u")


def test_a_table_holds_a_row() -> None:
    with pytest.raises(
        InputError, match=r"must be a float \(samples, ...\) table, got torch.float32 \(0, 4\)"
    ):
        TeacherTable.of(torch.zeros(0, 4))


def test_a_batch_is_sketched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = new_data(), []
    table = cache_teacher(new_teacher(), data, taps=["layers.0"])
    monkeypatch.setattr(teacher_table, "input_sketch", lambda inputs: calls.append(1) or input_sketch(inputs))
    batch = data.all()
    table.rows(batch), table.rows(batch, "layers.0")
    assert len(calls) == 1
    batch.inputs.add_(1)
    with pytest.raises(InputError, match="are not those that the teacher saw"):
        table.rows(batch)


def test_an_augmentation_of_other_inputs_of_the_same_ids_is_refused() -> None:
    data, other = new_data(), new_data()
    other.inputs = other.inputs + 1
    with pytest.raises(InputError, match="got one with other inputs for the same ids"):
        run(data, [SeededAugmentation(other, flipped)])


def test_too_few_versions_are_noticed_at_the_first_batch() -> None:
    data = new_data()
    few, many = (SeededAugmentation(data, flipped, versions=versions) for versions in (1, 2))
    table = cache_teacher(new_teacher(), data, augmentation=few)
    with pytest.raises(InputError, match="hold 1 versions of each sample and this run shows 2"):
        table.rows(many.marked(Batch(few.inputs(0), ids=data.ids), 0))


def test_a_table_takes_the_state_of_its_own_kind_alone() -> None:
    data = new_data()
    one, other = (cache_teacher(new_teacher(seed), data) for seed in (0, 1))
    state = json.loads(json.dumps(one.state()))
    one.require_state(state)
    with pytest.raises(InputError, match="do not apply: teacher .* stored, .* wanted$"):
        other.require_state(state)
    assert TeacherTable.of(torch.zeros(2, 2)).state() == {}
    with pytest.raises(InputError, match="teacher unknown stored"):
        TeacherTable.of(torch.zeros(2, 2)).require_state(state)


def test_embedding_targets_are_vectors_of_a_network_that_is_wrapped_once() -> None:
    encoder, data = nn.Linear(6, 3), new_data()
    assert EmbeddingTargets(Frozen(encoder)).dim == 3
    maps = cache_teacher(nn.Unflatten(1, (2, 3)), data)
    with pytest.raises(
        InputError, match=r"old must be a table of embeddings \(batch, dim\), got \(batch, 2, 3\)"
    ):
        EmbeddingTargets(maps, "old")

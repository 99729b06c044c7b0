"""Packing states: structures, shapes, dtypes, batch dimensions, f's calling convention, and what can't be packed."""

from __future__ import annotations

import dataclasses
import inspect
import traceback
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from deqcore import (
    DEQError,
    FunctionError,
    FunctionTypeError,
    StateError,
    StateSpec,
    StateTypeError,
    get_deq,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclasses.dataclass
class Pair:
    h: Tensor
    c: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    h: Any
    c: Any


@dataclasses.dataclass
class Guarded:
    """Counts how often its __init__ runs."""

    h: Tensor
    made = 0

    def __post_init__(self) -> None:
        type(self).made += 1


Named = namedtuple("Named", "h c")
torch_known = dataclasses.make_dataclass("torch_known", [("h", Tensor), ("c", Tensor)])
torch_known.__module__ = __name__


def z(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit, classes, order of keys and dtypes included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return len(a) == len(b) and all(map(same, a, b))


# ---- round trip

STRUCTURES = {
    "tensor": lambda: z(3, 4),
    "image": lambda: z(3, 2, 4, 5),
    "vector": lambda: z(3),
    "scalar": lambda: z(),
    "tuple": lambda: (z(3, 4), z(3, 2, 5), z(3)),
    "one tensor in a tuple": lambda: (z(3, 4),),
    "dict": lambda: {"h": z(3, 4), "c": z(3, 2)},
    "dict whose keys are not sorted": lambda: {"z": z(3, 1), "a": z(3, 2), 7: z(3)},
    "ordered dict": lambda: OrderedDict(h=z(3, 4), c=z(3, 2)),
    "default dict": lambda: defaultdict(list, h=z(3, 4)),
    "nested": lambda: {"h": [z(3, 4), (z(3), {"x": z(3, 2)})], "c": z(3, 1)},
    "dataclass": lambda: Pair(z(3, 4), z(3, 2)),
    "frozen dataclass with slots": lambda: Frozen([z(3, 4)], Pair(z(3), {"x": z(3, 2)})),
    "named tuple": lambda: Named(z(3, 4), [z(3, 2), z(3)]),
    "mixed dtypes": lambda: (z(3, 4, dtype=torch.float16), z(3, 2, dtype=torch.float64), z(3, dtype=torch.bfloat16)),
    "complex": lambda: z(3, 4, dtype=torch.complex64),
    "complex and real": lambda: {"h": z(3, 4, dtype=torch.complex128), "c": z(3, dtype=torch.float16)},
    "not contiguous": lambda: z(4, 3).T,
    "conjugate": lambda: z(3, 4, dtype=torch.complex64).conj(),
    "scalars": lambda: (z(), z(dtype=torch.float64)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_round_trip(name):
    state = STRUCTURES[name]()
    spec = StateSpec(state)
    packed = spec.pack(state)
    assert packed.shape == (spec.batch, spec.features) and not packed.is_complex()
    assert packed.dtype in (torch.float32, torch.float64)
    back = spec.unpack(packed)
    assert same(back, state)
    assert same(spec.output(packed), list(state) if type(state) is tuple else state)
    assert torch.equal(spec.round(packed), packed)
    assert spec.same_as(StateSpec(back)) and repr(spec)


def test_a_list_of_states_is_given_back_as_a_list():
    state = [z(3, 4), z(3)]
    spec = StateSpec(state)
    assert same(spec.output(spec.pack(state)), state)
    assert spec.same_as(StateSpec(tuple(state)))


@pytest.mark.parametrize(
    ("dtypes", "packed"),
    [
        ([torch.float16], torch.float32),
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float16, torch.float64], torch.float64),
        ([torch.float32, torch.complex64], torch.float32),
        ([torch.complex128, torch.float16], torch.float64),
    ],
)
def test_the_packed_dtype_is_the_widest_and_single_precision_at_least(dtypes, packed):
    state = tuple(z(3, 2, dtype=dtype) for dtype in dtypes)
    spec = StateSpec(state)
    assert spec.pack(state).dtype == spec.dtype == packed
    assert [leaf.dtype for leaf in spec.unpack(spec.pack(state))] == dtypes
    assert spec.eps == max(torch.finfo(dtype).eps for dtype in dtypes)


def test_rounding_is_to_each_leafs_own_dtype():
    state = (z(3, 2, dtype=torch.float16), z(3, 2, dtype=torch.float64))
    spec = StateSpec(state)
    fine = spec.pack(state) + 1e-5
    rounded = spec.round(fine)
    assert torch.equal(rounded[:, :2], fine[:, :2].half().double()) and torch.equal(rounded[:, 2:], fine[:, 2:])
    assert StateSpec(state[1]).round(fine) is fine


@pytest.mark.parametrize(
    ("batch_dims", "shapes", "batch"),
    [
        (0, [(3, 4)], 1),
        (0, [()], 1),
        (0, [(3, 4), (7,), ()], 1),
        (1, [(3, 4), (3,)], 3),
        (1, [()], 1),
        (2, [(3, 2)], 6),
        (2, [(3, 2, 4), (3, 2), (3, 2, 1, 5)], 6),
        (3, [(3, 2, 4, 5)], 24),
    ],
)
def test_batch_dims(batch_dims, shapes, batch):
    state = [z(*shape, seed=k) for k, shape in enumerate(shapes)]
    spec = StateSpec(state, batch_dims)
    packed = spec.pack(state)
    assert spec.batch == packed.shape[0] == batch
    assert packed.numel() == sum(leaf.numel() for leaf in state)
    assert same(spec.output(packed), state)


leaf_dtypes = st.sampled_from(DTYPES)


@st.composite
def states(draw, batch: tuple[int, ...]):
    counter = iter(range(1000))

    def leaf(parts):
        shape, dtype = parts
        return z(*batch, *shape, dtype=dtype, seed=next(counter))

    leaves = st.tuples(st.lists(st.integers(1, 3), max_size=2), leaf_dtypes).map(leaf)
    trees = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.text(max_size=3) | st.integers(), inner, min_size=1, max_size=3),
            st.builds(Pair, inner, inner),
            st.builds(Frozen, inner, inner),
            st.builds(Named, inner, inner),
        ),
        max_leaves=6,
    )
    return draw(trees)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.lists(st.integers(1, 3), max_size=2).map(tuple))
def test_any_state_comes_back(data, batch):
    state = data.draw(states(batch))
    spec = StateSpec(state, len(batch))
    packed = spec.pack(state)
    assert packed.shape[0] == spec.batch
    assert same(spec.unpack(packed), tuple(state) if type(state) is list else state)
    # every row is packed from its own sample alone
    other = spec.pack(pytree.tree_map(lambda t: t, spec.unpack(packed * 2)))
    assert torch.allclose(other, packed * 2, rtol=1e-2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_solve_keeps_any_state_as_it_is(data):
    """f = 0.5 z + 0.5 z0: z0 is the equilibrium, to the bit."""
    state = data.draw(states((2,)))
    spec = StateSpec(state)
    target = spec.pack(state)

    def fn(*parts):
        tree = parts if spec.as_arguments else parts[0]
        return spec.unpack(0.5 * spec.pack(tree) + 0.5 * target)

    z_out, info = get_deq(f_max_iter=3, f_tol=1e-2)(fn, state)
    assert same(z_out[-1], spec.output(target))
    assert info["abs_lowest"].shape == (2,)


# ---- how f is called


def solve(fn: Any, z0: Any, **options: Any) -> Any:
    args = options.pop("args", ())
    return get_deq(f_max_iter=60, f_tol=1e-6, f_solver="fixed_point_iter", **options)(fn, z0, args)[0][-1]


def test_one_tensor():
    out = solve(lambda h: 0.5 * h + 1, torch.zeros(3, 2))
    assert torch.allclose(out, torch.full((3, 2), 2.0), atol=1e-5)
    assert torch.allclose(solve(lambda h, x, y: 0.5 * h + x * y, torch.zeros(3, 2), args=(1.0, 2.0)), torch.tensor(4.0))


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("returns", [tuple, list])
def test_a_tuple_or_list_of_states_is_several_arguments(kind, returns):
    seen = []

    def fn(a, b, x):
        seen.append((a.shape, b.shape, a.dtype, b.dtype))
        return returns((0.5 * a + x, 0.5 * b + 1))

    z0 = kind((torch.zeros(3, 2), torch.zeros(3, 4, 5, dtype=torch.float64)))
    out = solve(fn, z0, args=[2.0])
    assert type(out) is list
    assert set(seen) == {((3, 2), (3, 4, 5), torch.float32, torch.float64)}
    assert torch.allclose(out[0], torch.tensor(4.0)) and torch.allclose(out[1], torch.tensor(2.0, dtype=torch.float64))


def test_any_other_tree_is_one_argument():
    def fn(s, x):
        return {"c": 0.5 * s["c"] + s["h"].sum(1, keepdim=True), "h": 0.5 * s["h"] + x}  # another order of keys

    out = solve(fn, {"h": torch.zeros(2, 3), "c": torch.zeros(2, 1)}, args=(1.0,))
    assert list(out) == ["h", "c"]
    assert torch.allclose(out["h"], torch.tensor(2.0), atol=1e-4) and torch.allclose(
        out["c"], torch.tensor(12.0), atol=1e-4
    )
    pair = solve(lambda s: Pair(0.5 * s.h + 1, 0.5 * s.c), Pair(torch.zeros(2, 3), torch.ones(2)))
    assert type(pair) is Pair and torch.allclose(pair.h, torch.tensor(2.0), atol=1e-4)
    named = solve(lambda s: Named(0.5 * s.h + 1, 0.5 * s.c), Named(torch.zeros(2, 3), torch.ones(2)))
    assert type(named) is Named and torch.allclose(named.h, torch.tensor(2.0), atol=1e-4)
    frozen = solve(lambda s: Frozen([0.5 * s.h[0] + 1], s.c), Frozen([torch.zeros(2, 3)], torch.ones(2)))
    assert type(frozen) is Frozen and torch.allclose(frozen.h[0], torch.tensor(2.0), atol=1e-4)


def test_what_f_may_return_for_the_same_structure():
    zeros = torch.zeros(2, 3)
    ordered = solve(lambda s: {"b": 0.5 * s["b"] + 2, "a": 0.5 * s["a"] + 1}, OrderedDict(a=zeros, b=zeros))
    assert type(ordered) is OrderedDict and list(ordered) == ["a", "b"]
    assert torch.allclose(ordered["a"], torch.tensor(2.0)) and torch.allclose(ordered["b"], torch.tensor(4.0))
    nested = solve(lambda a, b: [0.5 * a + 1, (0.5 * b[0] + 2,)], (zeros, [zeros]))
    assert type(nested[1]) is list and torch.allclose(nested[1][0], torch.tensor(4.0))


def test_a_dataclass_is_not_initialised_again():
    state = Guarded(torch.zeros(2, 3))
    before = Guarded.made

    def fn(s):
        out = object.__new__(Guarded)
        out.h = 0.5 * s.h + 1
        return out

    solve(fn, state)
    assert Guarded.made == before


def test_sampled_states_have_z0s_structure():
    z_out, _ = get_deq(n_states=3, f_max_iter=9, on_failure="ignore")(
        lambda s: {"h": 0.5 * s["h"] + 1}, {"h": torch.zeros(2, 3)}
    )
    assert len(z_out) == 3 and all(list(state) == ["h"] and state["h"].shape == (2, 3) for state in z_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", ["phantom", "implicit"])
def test_states_of_every_dtype_keep_theirs_and_carry_gradients(dtype, gradient):
    x = torch.full((3, 2), 0.5, dtype=dtype, requires_grad=True)
    z0 = (torch.zeros(3, 2, dtype=dtype), torch.zeros(3, 1))
    deq = get_deq(gradient=gradient, f_max_iter=40, f_tol=1e-2)
    z_out, info = deq(lambda a, b: (0.25 * a + x, 0.25 * b + 1), z0)
    a, b = z_out[-1]
    assert (a.dtype, b.dtype) == (dtype, torch.float32)
    assert torch.allclose(a.detach().to(torch.complex64), torch.tensor(2 / 3 + 0j), atol=2e-2)
    a.abs().sum().backward()
    expected = 4 / 3 if gradient == "implicit" else 1.0
    assert torch.allclose(x.grad.to(torch.complex64), torch.tensor(expected + 0j), atol=3e-2)
    assert info["z"].dtype in (torch.float32, torch.float64)


def test_gradients_of_a_structured_state_agree_with_unrolling():
    w = (0.1 * z(4, 4, dtype=torch.float64)).requires_grad_()
    x = z(3, 2, 2, dtype=torch.complex128, seed=1).requires_grad_()

    def fn(s):
        h = torch.tanh(s["h"] @ w + s["c"].abs().flatten(1))
        return {"h": h, "c": 0.3 * s["c"] + 0.1 * h.reshape(3, 2, 2) * x}

    start = {"h": torch.zeros(3, 4, dtype=torch.float64), "c": torch.zeros(3, 2, 2, dtype=torch.complex128)}

    def loss(s):
        return s["h"].square().sum() + (s["c"] * (1 + 2j)).real.sum()

    implicit = get_deq(ift=True, f_tol=1e-13, f_max_iter=500, b_tol=1e-13)
    found = torch.autograd.grad(loss(implicit(fn, start)[0][-1]), (w, x))
    state = start
    for _ in range(200):
        state = fn(state)
    expected = torch.autograd.grad(loss(state), (w, x))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_one_equilibrium_over_all_rows():
    """batch_dims=0: rows may differ in number, and there is one residual."""
    nodes, edges = torch.zeros(5, 2), torch.zeros(7)
    z_out, info = get_deq(batch_dims=0, f_max_iter=200, f_tol=1e-4)(
        lambda n, e: (0.5 * n + e.mean(), 0.5 * e + n.mean() * 0.1 + 1), (nodes, edges)
    )
    assert [part.shape for part in z_out[-1]] == [(5, 2), (7,)]
    assert info["abs_lowest"].shape == info["status"].shape == info["nstep"].shape == (1,)


def test_one_residual_for_each_of_several_batch_dimensions():
    _, info = get_deq(batch_dims=2, f_max_iter=60)(lambda h: 0.5 * h + 1, torch.zeros(3, 4, 5))
    assert info["abs_lowest"].shape == (12,)


def test_a_scalar_equation():
    z_out, info = get_deq(f_max_iter=100, f_tol=1e-7)(torch.cos, torch.zeros((), dtype=torch.float64))
    assert z_out[-1].shape == () and abs(z_out[-1].item() - 0.7390851) < 1e-6
    assert info["status"].shape == (1,)
    z_out, info = get_deq(f_max_iter=100, f_tol=1e-7)(torch.cos, torch.zeros(4))
    assert z_out[-1].shape == (4,) and info["status"].shape == (4,)


def test_the_callers_start_is_neither_changed_nor_handed_out():
    start = z(3, 2)
    before = start.clone()
    for options in ({}, {"f_max_iter": 0}, {"f_solver": "anderson"}):
        for training in (True, False):
            z_out, info = get_deq(on_failure="ignore", **options).train(training)(lambda h: 0.5 * h + 1, start)
            with torch.no_grad():
                z_out[-1].add_(1)
                info["z"].add_(1)
            assert torch.equal(start, before)


# ---- what can't be packed


@pytest.mark.parametrize(
    ("z0", "error", "text"),
    [
        (None, StateTypeError, r"z0 is None \(NoneType\)"),
        (3, StateTypeError, r"z0 is 3 \(int\).*torch.as_tensor"),
        (1.5, StateTypeError, r"z0 is 1.5 \(float\)"),
        ("abc", StateTypeError, "z0 is a str"),
        ({torch.zeros(2)}, StateTypeError, "z0 is a set"),
        (torch.zeros(2).numpy(), StateTypeError, "ndarray.*torch.as_tensor"),
        ((), StateError, r"z0 holds no tensor: got \(\). Give a tensor"),
        ({}, StateError, "z0 holds no tensor"),
        ({"a": []}, StateError, "z0 holds no tensor"),
        ({"a": torch.zeros(2), "b": None}, StateTypeError, r"z0\['b'\] is None"),
        (Pair(torch.zeros(2), 3), StateTypeError, r"z0.c is 3 \(int\)"),
        (torch.zeros(2, dtype=torch.int64), StateTypeError, r"z0 is an int64 tensor of shape \(2,\).*\.float\(\)"),
        ((torch.zeros(2), torch.ones(2) > 0), StateTypeError, r"z0\[1\] is a bool tensor"),
        (torch.zeros(2).to(torch.float8_e4m3fn), StateTypeError, "16 bits at least"),
        (torch.eye(2).to_sparse(), StateTypeError, "layout torch.sparse_coo.*dense"),
        (
            (torch.zeros(3), torch.zeros(4, 2)),
            StateError,
            r"different batch sizes \(z0\[0\]: \(3,\), z0\[1\]: \(4, 2\)\)",
        ),
        ((torch.zeros(()), torch.zeros(3)), StateError, r"z0\[0\] has shape \(\), which has no room for batch_dims=1"),
        (torch.zeros(0, 3), StateError, r"z0 is empty \(z0: \(0, 3\)\)"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 0)}, StateError, "z0 is empty"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), StateError, "different devices: cpu, meta"),
        (torch.full((2, 3), float("nan")), StateError, "z0 holds NaN or inf in 2 of 2 samples"),
        ((torch.zeros(3), torch.tensor([0.0, float("inf"), 0.0])), StateError, "NaN or inf in 1 of 3 samples"),
        (torch.complex(torch.zeros(2), torch.tensor([0.0, float("nan")])), StateError, "NaN or inf in 1 of 2"),
    ],
)
def test_what_can_not_be_packed(z0, error, text):
    with pytest.raises(error, match=text) as caught:
        get_deq()(lambda *state: state[0], z0)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, DEQError)
    assert isinstance(caught.value, TypeError) == (error is StateTypeError)


def test_too_few_dimensions_for_batch_dims():
    with pytest.raises(StateError, match=r"shape \(3, 2\).*no room for batch_dims=3.*batch_dims=0"):
        get_deq(batch_dims=3)(lambda h: h, torch.zeros(3, 2))
    with pytest.raises(StateError, match=r"with batch_dims=2 the first 2 size\(s\) must agree"):
        get_deq(batch_dims=2)(lambda a, b: (a, b), (torch.zeros(3, 2), torch.zeros(3, 4)))


def in_place(h):
    h += 1
    return h * 0.5


def in_place_through_a_view(h):
    h[:, 0].zero_()
    return h * 0.5


ONE, TWO = torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(2, 1))
TREE = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)}


@pytest.mark.parametrize(
    ("fn", "z0", "error", "text"),
    [
        (lambda h: None, ONE, FunctionTypeError, r"f returned None \(NoneType\) where z0 has a tensor"),
        (lambda h: 1.0, ONE, FunctionTypeError, r"f returned 1.0 \(float\)"),
        (lambda h: h.numpy(), ONE, FunctionTypeError, "ndarray"),
        (lambda h: h[:, :1], ONE, FunctionError, r"f returned shape \(2, 1\) where z0 has shape \(2, 3\)"),
        (lambda h: h.sum(), ONE, FunctionError, r"f returned shape \(\)"),
        (lambda h: h.T, ONE, FunctionError, r"f returned shape \(3, 2\)"),
        (lambda h: h.long(), ONE, FunctionTypeError, "f returned an int64 tensor .* where z0 is float32"),
        (lambda h: h > 0, ONE, FunctionTypeError, "f returned a bool tensor"),
        (lambda h: h + 1j, ONE, FunctionTypeError, "f returned a complex64 tensor .* where z0 is float32"),
        (
            lambda h: h.abs(),
            ONE.to(torch.complex64),
            FunctionTypeError,
            "f returned a float32 .* where z0 is complex64",
        ),
        (lambda h: (h,), ONE, FunctionTypeError, r"f returned a tuple of \[0\].*; z0 is one tensor of shape \(2, 3\)"),
        (lambda h: {"h": h}, ONE, FunctionTypeError, r"f returned a dict of \['h'\]"),
        (lambda h: h.to("meta"), ONE, FunctionError, "f returned a tensor on meta where z0 is on cpu"),
        (lambda h: torch.eye(2, 3).to_sparse(), ONE, FunctionTypeError, "layout torch.sparse_coo where z0 is dense"),
        (lambda h: h.add_(1), ONE, FunctionError, "f changed its input in place.*z = z [+]"),
        (in_place, ONE, FunctionError, "f changed its input in place"),
        (in_place_through_a_view, ONE, FunctionError, "f changed its input in place"),
        (in_place, ONE.half(), FunctionError, "f changed its input in place"),
        (in_place, ONE.to(torch.complex64), FunctionError, "f changed its input in place"),
        (lambda a, b: (a.add_(1), b), TWO, FunctionError, "f changed its input in place"),
        (lambda a, b: (a, b.add_(1)), (ONE.half(), ONE), FunctionError, "f changed its input in place"),
        (lambda s: {"a": s["a"], "b": s["b"].add_(1)}, TREE, FunctionError, "f changed its input in place"),
        (
            lambda a, b: None,
            TWO,
            FunctionTypeError,
            r"f returned None \(NoneType\) for a state of 2 tensors; return a tuple",
        ),
        (lambda a, b: a, TWO, FunctionTypeError, "f returned a float32 tensor .* for a state of 2 tensors"),
        (lambda a, b: (a, b, a), TWO, FunctionTypeError, r"f returned a tuple of \[0\].*\[2\].*; z0 is a tuple of"),
        (lambda a, b: (a,), TWO, FunctionTypeError, r"f returned a tuple of \[0\]"),
        (lambda a, b: (), TWO, FunctionTypeError, "f returned a tuple of nothing"),
        (lambda a, b: (b, a), TWO, FunctionError, r"f returned shape \(2, 1\) where z0\[0\] has shape \(2, 3\)"),
        (lambda a, b: (a, None), TWO, FunctionTypeError, r"f returned None \(NoneType\) where z0\[1\] has a tensor"),
        (lambda a, b: (x for x in (a, b)), TWO, FunctionTypeError, "f returned a generator for a state of 2 tensors"),
        (lambda a, b: {"a": a}, TWO, FunctionTypeError, "f returned a dict for a state of 2 tensors"),
        (lambda a, b: (a, b.to("meta")), TWO, FunctionError, r"on meta where z0\[1\] is on cpu"),
        (lambda s: None, TREE, FunctionTypeError, r"f returned None \(NoneType\); z0 is a dict of \['a'\]: \(2, 3\)"),
        (lambda s: {"a": s["a"]}, TREE, FunctionTypeError, r"f returned a dict of \['a'\].*; z0 is a dict"),
        (lambda s: {"a": s["a"], "c": s["b"]}, TREE, FunctionTypeError, r"\['c'\]"),
        (lambda s: {"a": s["a"], "b": 1}, TREE, FunctionTypeError, r"f returned 1 \(int\) where z0\['b'\]"),
        (lambda s: [s["a"], s["b"]], TREE, FunctionTypeError, "f returned a list of"),
        (lambda s: (s.h, s.c), Named(*TWO), FunctionTypeError, r"f returned a tuple of .*; z0 is a Named of .h"),
        (lambda s: Frozen(s.h, s.c), Pair(*TWO), FunctionTypeError, r"f returned a Frozen of .*; z0 is a Pair of .h"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("max_iter", [3, 0])
def test_what_f_may_not_do(fn, z0, error, text, training, max_iter):
    z0 = (
        pytree.tree_map_only(Tensor, torch.clone, z0)
        if not dataclasses.is_dataclass(z0)
        else Pair(z0.h.clone(), z0.c.clone())
    )
    deq = get_deq(f_max_iter=max_iter, on_failure="ignore").train(training)
    with pytest.raises(error, match=text) as caught:
        deq(fn, z0)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, DEQError)
    assert isinstance(caught.value, TypeError) == (error is FunctionTypeError)


def test_f_that_goes_wrong_later_is_refused_then():
    for z0, good, bad in (
        (ONE, lambda h: 0.5 * h + 1, lambda h: h[:, :1]),
        (TWO, lambda a, b: (0.5 * a + 1, b), lambda a, b: (b, a)),
        (TREE, lambda s: {"a": 0.5 * s["a"] + 1, "b": s["b"]}, lambda s: {"a": s["b"], "b": s["a"]}),
    ):
        calls = []

        def fn(*state, good=good, bad=bad, calls=calls):
            calls.append(1)
            return (good if len(calls) < 4 else bad)(*state)

        with pytest.raises(FunctionError, match="f returned shape"):
            get_deq()(fn, z0)
        assert len(calls) == 4


def test_f_may_return_another_float_dtype():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        out = solve(lambda h, dtype=dtype: (0.5 * h + 1).to(dtype), torch.zeros(2, 3))
        assert out.dtype == torch.float32 and torch.allclose(out, torch.tensor(2.0), atol=1e-2)
    out = solve(lambda a, b: ((0.5 * a + 1).double(), (0.5 * b + 1).half()), TWO)
    assert {part.dtype for part in out} == {torch.float32}
    out = solve(lambda h: (0.5 * h + 1).to(torch.complex128), torch.zeros(2, 3, dtype=torch.complex64))
    assert out.dtype == torch.complex64


@pytest.mark.parametrize("state", [ONE, TWO, TREE], ids=["tensor", "tuple", "dict"])
@pytest.mark.parametrize("solver", ["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"])
def test_an_exception_of_fs_own_passes_through_unchanged(state, solver):
    class Mine(Exception):
        pass

    raised = Mine("of my own", 3)
    calls = []

    def fn(*parts):
        calls.append(1)
        if len(calls) == 3:
            raise raised
        return parts[0] if not isinstance(state, tuple) else parts

    with pytest.raises(Mine) as caught:
        get_deq(f_solver=solver, f_tol=0)(fn, state)
    assert caught.value is raised and caught.value.args == ("of my own", 3)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.name) == (__file__, "fn")
    assert last.lineno == inspect.getsourcelines(fn)[1] + 3


def test_an_exception_in_the_backward_passes_through():
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return 0.5 * h

        @staticmethod
        def backward(ctx, grad):
            raise KeyError("mine")

    x = torch.ones(2, 3, requires_grad=True)
    z_out, _ = get_deq(ift=True)(lambda h: Raises.apply(h) + x, torch.zeros(2, 3))
    with pytest.raises(KeyError, match="mine"):
        z_out[-1].sum().backward()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, StopIteration, RuntimeError, ValueError, TypeError, AttributeError]
)
def test_any_kind_of_exception(error):
    def fn(h):
        raise error("mine")

    with pytest.raises(error) as caught:
        get_deq()(fn, ONE)
    assert not isinstance(caught.value, DEQError)


def test_f_called_with_the_wrong_number_of_arguments_is_pythons_own_error():
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        get_deq()(lambda a: a, TWO)


def test_inference_mode():
    with torch.inference_mode():
        for z0 in (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16)):
            z_out, _ = get_deq()(lambda h: 0.5 * h + 1, z0)
            assert torch.allclose(z_out[-1].float(), torch.tensor(2.0), atol=1e-2)
        z_out, _ = get_deq().eval()(lambda a, b: (0.5 * a + 1, 0.5 * b), (torch.zeros(2, 3), torch.zeros(2, 3).half()))
        assert torch.allclose(z_out[-1][0], torch.tensor(2.0), atol=1e-2)

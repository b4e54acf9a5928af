"""The C++ kernel against the reference, and what happens where it cannot be built."""

import ctypes
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import kernels
from headwise.errors import BadInput, KernelUnavailable, ShapeMismatch
from headwise.kernels import compiled, get_kernel, native, pages, reference
from headwise.kernels.quantised import Bits
from headwise.kernels.segments import Segments, quantise

HEADS = 2


def needs_compiler(test):
    """Skip, saying why, where there is no compiler."""
    missing = kernels.why_not("native")
    return pytest.mark.skipif(missing is not None, reason=str(missing))(test)


def make_case(lengths, rows, *, group=2, num_new=1, dim=32, tail=4, dtype=torch.float32, masked=False, seed=0):
    """Query, segments, rows, tail and mask; query and tail are views of larger tensors, as a model's are."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    batch, total = len(rows), sum(lengths)
    segments = Segments(
        keys=randn(total, dim).to(dtype),
        values=randn(total, dim).to(dtype),
        positions=torch.arange(total, dtype=torch.int32),
        lengths=tuple(lengths),
        kv_heads=HEADS,
    )
    query = (2 * randn(batch, num_new, HEADS, group, dim)).to(dtype).permute(0, 2, 3, 1, 4)
    tail_keys, tail_values = (randn(batch, HEADS, tail + 3, dim).to(dtype)[:, :, :tail] for _ in range(2))
    mask = torch.rand(batch, num_new, tail, generator=generator) < 0.6 if masked else None
    return query, segments, torch.tensor(rows), tail_keys, tail_values, mask, dim**-0.5


def exactly(query, segments, rows, tail_keys, tail_values, mask, scaling):
    """The reference in float64."""
    precise = Segments(
        keys=segments.keys.double(),
        values=segments.values.double(),
        positions=segments.positions,
        lengths=segments.lengths,
        kv_heads=segments.kv_heads,
        quantised=segments.quantised,
    )
    return reference.attend(query.double(), precise, rows, tail_keys.double(), tail_values.double(), mask, scaling)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=4, max_size=4),
    rows=st.lists(st.integers(0, 1), min_size=1, max_size=5),
    group=st.integers(1, 9),
    num_new=st.sampled_from([1, 2, 5, 17]),
    dim=st.sampled_from([16, 48, 64, 80, 96, 112, 128, 256]),
    tail=st.integers(1, 70),
    masked=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_equals_the_reference(lengths, rows, group, num_new, dim, tail, masked, threads):
    case = make_case(lengths, rows, group=group, num_new=num_new, dim=dim, tail=tail, masked=masked)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = torch.ops.headwise.attend_ragged(case[0], case[1].keys, case[1].values, case[1].spans, *case[2:])
    torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), exactly(*case), rtol=1e-4, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_new", [1, 12])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_error_is_at_most_twice_that_of_pytorch(dtype, num_new, dim, threads):
    case = make_case([3000, 5, 70, 900], [0, 1], group=4, num_new=num_new, dim=dim, tail=20, dtype=dtype, masked=True)
    exact = exactly(*case)
    ours, plain = (kernel(*case).double() - exact for kernel in (native.attend, pages.attend))
    assert ours.norm() <= 2 * plain.norm()


def stored(case, *kinds):
    """The same case with entries quantised: one in three as each of the kinds, in turn, the others native."""
    query, segments, *rest = case
    for number, kind in enumerate(kinds):
        segments = quantise(segments, segments.positions % 3 == number, kind)
    return query, segments, *rest


KINDS = [Bits(keys=8, values=8), Bits(keys=8, values=4), Bits(keys=4, values=4), Bits(keys=4, values=8)]


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=4, max_size=4),
    rows=st.lists(st.integers(0, 1), min_size=1, max_size=5),
    group=st.integers(1, 5),
    num_new=st.sampled_from([1, 2, 5]),
    dim=st.sampled_from([32, 64, 96, 128, 256]),
    tail=st.integers(1, 70),
    kinds=st.permutations(KINDS),
    threads=st.sampled_from([1, 2]),
)
def test_quantised_entries_equal_the_reference(lengths, rows, group, num_new, dim, tail, kinds, threads):
    case = stored(make_case(lengths, rows, group=group, num_new=num_new, dim=dim, tail=tail, masked=True), *kinds[:2])
    assert native.serves(*case[:2])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = native.attend(*case)
    torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), exactly(*case), rtol=1e-4, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("dim", "num_new"), [(64, 1), (128, 1), (80, 1), (256, 12)])
def test_error_over_quantised_entries_is_at_most_twice_that_of_pytorch(dtype, kind, dim, num_new, threads):
    """PyTorch's, over the same entries as numbers of the query's precision."""
    case = make_case([3000, 5, 70, 900], [0, 1], group=4, num_new=num_new, dim=dim, tail=20, dtype=dtype, masked=True)
    case = stored(case, kind)
    exact = exactly(*case)
    ours, plain = (kernel(*case).double() - exact for kernel in (native.attend, pages.attend))
    assert ours.norm() <= 2 * plain.norm()


@needs_compiler
def test_4_bits_of_heads_without_two_halves_of_vectors_go_to_pages(monkeypatch):
    case = stored(make_case([70, 30], [0], dim=48), KINDS[2])
    wide = replace(native.load(), lanes=16)
    monkeypatch.setattr(native, "load", lambda: wide)
    expected = pages.attend(*case)
    monkeypatch.setattr(pages, "attend", lambda *arguments: expected + 7)
    assert torch.equal(native.attend(*case), expected + 7)


@needs_compiler
def test_large_logits_do_not_overflow(threads):
    query, *others = make_case([600, 3, 70, 900], [0, 1], dtype=torch.bfloat16)
    case = (100 * query, *others)
    torch.testing.assert_close(native.attend(*case).double(), exactly(*case), rtol=0.02, atol=0.02)


@needs_compiler
@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_query_that_sees_nothing_of_the_tail(group, dim):
    *case, mask, scaling = make_case([30, 4, 7, 9], [0, 1, 1], group=group, dim=dim, tail=1, num_new=2, masked=True)
    mask[:] = False
    torch.testing.assert_close(
        native.attend(*case, mask, scaling).double(), exactly(*case, mask, scaling), rtol=1e-4, atol=1e-5
    )


@needs_compiler
def test_a_head_without_entries_and_a_context_without_readers():
    case = make_case([0, 40, 7, 9, 0, 0], [0, 2, 0], tail=5)
    torch.testing.assert_close(native.attend(*case).double(), exactly(*case), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_many_queries_on_long_segments_go_to_pages(monkeypatch):
    case = make_case([2000, 2000], [0] * 8, num_new=16)
    monkeypatch.setattr(native, "load", lambda: pytest.fail("the C++ kernel was used"))
    torch.testing.assert_close(native.attend(*case).double(), exactly(*case), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_float16_goes_to_pages_where_the_cpu_has_none(monkeypatch):
    case = make_case([600, 3], [0], dtype=torch.float16)
    monkeypatch.setattr(pages, "attend", lambda query, *arguments: torch.full_like(query, 7))
    assert not (native.attend(*case) == 7).any()
    poor = replace(native.load(), dtypes=frozenset({torch.float32, torch.bfloat16}))
    monkeypatch.setattr(native, "load", lambda: poor)
    assert (native.attend(*case) == 7).all()


@needs_compiler
def test_it_is_a_custom_op():
    case = make_case([30, 4, 7, 9], [0, 1], tail=3)
    arguments = (case[0], case[1].keys, case[1].values, case[1].spans, *case[2:])
    torch.library.opcheck(torch.ops.headwise.attend_ragged, arguments)
    compiled = torch.compile(torch.ops.headwise.attend_ragged, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), native.attend(*case))


@needs_compiler
def test_auto_takes_it_on_the_cpu(monkeypatch):
    case = make_case([30, 4, 7, 9], [0, 1])
    monkeypatch.setattr(pages, "attend", lambda *arguments: pytest.fail("pages was used"))
    assert torch.equal(get_kernel("auto")(*case), get_kernel("native")(*case))
    assert {found.name: found.used_on for found in kernels.survey()}["native"] == "cpu"


@pytest.fixture
def nothing_cached(monkeypatch, tmp_path):
    """As if no kernel had been built or asked for yet."""
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    remembered = (native.load, kernels.why_not, kernels._by_device)
    for function in remembered:
        function.cache_clear()
    yield tmp_path
    for function in remembered:
        function.cache_clear()


def test_without_a_compiler_pages_serves_and_one_warning_says_so(monkeypatch, nothing_cached):
    monkeypatch.setenv("CXX", "no-such-compiler")
    case = make_case([30, 4, 7, 9], [0, 1])
    with pytest.raises(KernelUnavailable, match="CXX='no-such-compiler' is not there"):
        get_kernel("native")
    with pytest.warns(UserWarning, match="install g\\+\\+"):
        found = get_kernel("auto")(*case)
    assert torch.equal(found, pages.attend(*case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_kernel("auto")(*case)
    assert {one.name: (one.usable, one.used_on) for one in kernels.survey()}["native"] == (False, None)
    assert kernels.fastest(torch.device("cpu")) == "pages"


@pytest.fixture(scope="module")
def avx512(tmp_path_factory):
    """The library as CPUs with AVX-512 and bfloat16 dot products get it; those instructions are emulated."""
    made = str(tmp_path_factory.mktemp("avx512") / "made.so")
    emulation = str(Path(__file__).with_name("avx512.h"))
    command = [*compiled.find_compiler(), *native.FLAGS, "-include", emulation, str(native.SOURCE), "-o", made]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(made)
    library.headwise_features.restype = ctypes.c_char_p
    assert library.headwise_features() == b"AVX-512, bfloat16 dot products"
    library.headwise_attend.argtypes = native.load().function.argtypes
    assert library.headwise_lanes() == 16
    return replace(native.load(), function=library.headwise_attend, lanes=16)


@needs_compiler
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the emulation is made of AVX2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "num_new"), [(1, 1), (3, 1), (4, 1), (8, 2)])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])  # of 16 and 80, dot products of 32 numbers cannot be made
def test_the_code_for_avx512(avx512, monkeypatch, dtype, group, num_new, dim, threads):
    case = make_case(
        [1000, 5, 70, 33], [0, 1], group=group, num_new=num_new, dim=dim, tail=20, dtype=dtype, masked=True
    )
    exact = exactly(*case)
    plain = pages.attend(*case).double() - exact
    monkeypatch.setattr(native, "load", lambda: avx512)
    assert (native.attend(*case).double() - exact).norm() <= 2 * plain.norm()


@needs_compiler
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the emulation is made of AVX2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("dim", "group"), [(32, 1), (64, 3), (128, 4), (256, 2)])
def test_the_code_for_avx512_over_quantised_entries(avx512, monkeypatch, dtype, kind, dim, group):
    case = stored(make_case([300, 5, 70, 33], [0, 1], group=group, dim=dim, tail=20, dtype=dtype), kind)
    exact = exactly(*case)
    plain = pages.attend(*case).double() - exact
    monkeypatch.setattr(native, "load", lambda: avx512)
    assert native.serves(*case[:2])
    assert (native.attend(*case).double() - exact).norm() <= 2 * plain.norm()


@needs_compiler
def test_it_compiles_for_cpus_with_avx512(tmp_path):
    """Whatever this machine is: that part of the source is seen by the compiler at least."""
    flags = [flag for flag in native.FLAGS if flag != "-march=native"]
    target = ["-march=sapphirerapids"]
    command = [*compiled.find_compiler(), *flags, *target, str(native.SOURCE), "-o", str(tmp_path / "made.so")]
    probe = subprocess.run([command[0], *target, "-E", "-"], input="", capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"the compiler knows no {target}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def of_op():
    """Arguments of the op, all of which fit."""
    query, segments, *rest = make_case([30, 4, 7, 9], [0, 1, 1], num_new=2, tail=5, masked=True)
    return dict(
        zip(
            ("query", "keys", "values", "spans", "rows", "tail_keys", "tail_values", "mask", "scaling"),
            (query, segments.keys, segments.values, segments.spans, *rest),
            strict=True,
        )
    )


def with_one(index, value):
    def change(tensor):
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


UNFIT = {
    "a row that is no context": ("rows", with_one(2, 2)),
    "a row below 0": ("rows", with_one(0, -1)),
    "a row far away": ("rows", with_one(0, 2**62)),
    "a span that begins before the keys": ("spans", with_one((0, 0), -1)),
    "a span that ends behind the keys": ("spans", with_one((1, 3), 10)),
    "a span whose end is beyond all numbers": ("spans", with_one((1, 0), 2**63 - 1)),
    "a span of fewer than no keys": ("spans", with_one((1, 0), -1)),
    "spans of one context": ("spans", lambda x: x[:, :2].contiguous()),
    "spans of half a context": ("spans", lambda x: x[:, :3].contiguous()),
    "spans without lengths": ("spans", lambda x: x[:1]),
    "spans in 32 bits": ("spans", torch.Tensor.int),
    "spans with gaps": ("spans", lambda x: torch.stack([x, x], dim=-1)[..., 0]),
    "rows in 32 bits": ("rows", torch.Tensor.int),
    "fewer rows": ("rows", lambda x: x[:2]),
    "rows with gaps": ("rows", lambda x: torch.stack([x, x], dim=-1)[:, 0]),
    "fewer keys": ("keys", lambda x: x[:-1]),
    "shorter keys": ("keys", lambda x: x[:, :16].contiguous()),
    "keys of another dtype": ("keys", torch.Tensor.double),
    "keys of fewer bytes": ("keys", torch.Tensor.bfloat16),
    "keys with gaps": ("keys", lambda x: torch.stack([x, x], dim=-1)[..., 0]),
    "keys by columns": ("keys", lambda x: x.T.contiguous().T),
    "fewer values": ("values", lambda x: x[:3]),
    "shorter values": ("values", lambda x: x[:, :16].contiguous()),
    "values of another dtype": ("values", torch.Tensor.half),
    "a query of another dtype": ("query", torch.Tensor.double),
    "a query of no dtype of ours": ("query", torch.Tensor.int),
    "a query of longer heads": ("query", lambda x: torch.cat([x, x], dim=-1)),
    "a query of more heads": ("query", lambda x: torch.cat([x, x], dim=1)),
    "a query of more rows": ("query", lambda x: torch.cat([x, x])),
    "a query without an axis": ("query", lambda x: x[0]),
    "a query without heads": ("query", lambda x: x[:, :0]),
    "a query of no axes": ("query", lambda x: x.flatten()[0]),
    "fewer tail values": ("tail_values", lambda x: x[:, :, :2]),
    "a tail of fewer rows": ("tail_keys", lambda x: x[:2]),
    "a tail of fewer heads": ("tail_values", lambda x: x[:, :1]),
    "a tail of shorter heads": ("tail_keys", lambda x: x[..., :16]),
    "a tail of another dtype": ("tail_keys", torch.Tensor.bfloat16),
    "a shorter mask": ("mask", lambda x: x[:, :, :-1]),
    "a mask of fewer queries": ("mask", lambda x: x[:, :1]),
    "a mask of numbers": ("mask", torch.Tensor.float),
}


@needs_compiler
@pytest.mark.parametrize("how", UNFIT)
def test_the_op_refuses_what_would_be_read_out_of_bounds(how):
    """Anybody can call it; numbers in rows and spans are addresses."""
    name, change = UNFIT[how]
    arguments = of_op()
    expected = torch.ops.headwise.attend_ragged(*arguments.values())
    with pytest.raises(ShapeMismatch):
        torch.ops.headwise.attend_ragged(*{**arguments, name: change(arguments[name])}.values())
    assert torch.equal(torch.ops.headwise.attend_ragged(*arguments.values()), expected)


UNFIT_CODES = {
    "keys of another dtype": (0, torch.Tensor.char),
    "fewer keys": (0, lambda x: x[:-1]),
    "keys of other bits": (0, lambda x: x[:, :8].contiguous()),
    "scales of another dtype": (1, torch.Tensor.bfloat16),
    "fewer blocks": (1, lambda x: x[:-1]),
    "scales without zeros": (1, lambda x: x[:, :1].contiguous()),
    "fewer values": (2, lambda x: x[:-1]),
    "values with gaps": (2, lambda x: torch.stack([x, x], -1)[..., 0]),
    "fewer scales": (3, lambda x: x[:-1]),
    "more groups": (3, lambda x: torch.cat([x, x], -1)),
    "spans without blocks": (4, lambda x: x[:2]),
    "a span behind the keys": (4, with_one((1, 3), 10)),
    "a span before the keys": (4, with_one((0, 0), -1)),
    "a block that is not there": (4, with_one((2, 3), 99)),
    "a block below 0": (4, with_one((2, 0), -1)),
}


@needs_compiler
@pytest.mark.parametrize("how", UNFIT_CODES)
def test_the_op_refuses_codes_that_would_be_read_out_of_bounds(how):
    query, segments, *rest = stored(make_case([30, 4, 7, 9], [0, 1], dim=64), KINDS[0])
    (part,) = segments.quantised
    codes = [part.keys, part.key_scales, part.values, part.value_scales, part.spans]
    arguments = (query, segments.keys, segments.values, segments.spans, *rest)
    expected = torch.ops.headwise.attend_ragged(*arguments, codes)
    which, change = UNFIT_CODES[how]
    changed = change(codes[which])
    with pytest.raises(ShapeMismatch):
        torch.ops.headwise.attend_ragged(*arguments, [changed if i == which else t for i, t in enumerate(codes)])
    with pytest.raises(ShapeMismatch):
        torch.ops.headwise.attend_ragged(*arguments, codes[:-1])
    assert torch.equal(torch.ops.headwise.attend_ragged(*arguments, codes), expected)


@needs_compiler
@pytest.mark.parametrize("dim", [8, 272])
def test_the_op_refuses_heads_that_it_is_not_made_for(dim):
    query, segments, *rest = make_case([3, 4], [0], dim=dim)
    with pytest.raises(ShapeMismatch, match=f"multiple of 16 up to 256; found {dim}"):
        torch.ops.headwise.attend_ragged(query, segments.keys, segments.values, segments.spans, *rest)


@needs_compiler
def test_the_op_gets_no_tensor_of_another_device():
    """PyTorch itself calls no op for the CPU then."""
    for name in ("query", "keys", "rows", "spans", "tail_values"):
        arguments = of_op()
        arguments[name] = arguments[name].to("meta")
        assert torch.ops.headwise.attend_ragged(*arguments.values()).is_meta or name != "query"


@needs_compiler
def test_only_memory_in_one_piece_is_read():
    for states in (torch.ones(4, 4).T[:, :2], torch.ones(4, device="meta")):
        with pytest.raises(BadInput, match="contiguous tensor on the CPU"):
            native.read(states)

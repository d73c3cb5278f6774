"""Arrays that came from elsewhere: what NumPy writes is read, all else is refused by name."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedkl.errors import UpdateError
from fedkl.flower import records
from fedkl.flower.records import fitted, tensors_of
from fedkl.update import TensorSpec

SECRET = b"SECRET"
PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
EIGHT = np.arange(2, dtype=np.float32).tobytes()


def npy(header=PLAIN, data=EIGHT, *, version=b"\x01\x00"):
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def said(data, dtype="float32", shape=(2,), stype="numpy.ndarray"):
    return Array(dtype, shape, stype, data)


def with_shape(text, data=b"", shape=(2,)):
    return said(npy(PLAIN.replace("(2,)", text), data), shape=shape)


HOSTILE = {
    "zip": said(b"PK\x03\x04" + SECRET),
    "zip of nothing": said(b"PK\x05\x06" + bytes(18)),
    "pickle": said(pickle.dumps("SECRET")),
    "nothing": said(b""),
    "magic only": said(b"\x93NUMPY\x01\x00"),
    "no header": said(npy()[:10]),
    "deep header": said(npy("[" * 900)),
    "deep in a name": said(npy("{'descr': " + "(" * 300 + "SECRET")),
    "open text": said(npy("{'descr': '''SECRET")),
    "long header": said(npy(PLAIN + " " * 2000)),
    "length of another": said(npy()[:8] + b"\xff\xff" + npy()[10:]),
    "other version": said(npy(version=b"\x02\x00")),
    "objects": said(npy(PLAIN.replace("<f4", "|O"), pickle.dumps("SECRET"))),
    "texts": Array(np.array(["SECRET"])),
    "records": Array(np.zeros(1, dtype=[("SECRET", "f4")])),
    "dates": Array(np.zeros(1, dtype="M8[s]")),
    "long double": Array(np.zeros(1, dtype=np.longdouble)),
    "big-endian": Array(np.zeros(1, dtype=">f4")),
    "unknown dtype": said(npy(PLAIN.replace("<f4", "<f3"))),
    "python 2": with_shape("(2L,)", EIGHT),
    "keys in another order": said(npy("{'shape': (2,), 'descr': '<f4', 'fortran_order': False, }")),
    "more keys": said(npy(PLAIN.replace("}", "'SECRET': 1, }"))),
    "bytes left": said(npy(data=EIGHT + SECRET)),
    "bytes missing": said(npy(data=EIGHT[:7])),
    "no bytes": said(npy(data=b"")),
    "a petabyte": with_shape("(1000000000000000,)", shape=(10**15,)),
    "more than there is": with_shape("(9999999999999999999, 9999999999999999999)"),
    "an empty one that is too large": with_shape("(0, 9999999999999999999)", shape=(0, 10**19 - 1)),
    "negative": with_shape("(-2,)", EIGHT),
    "no integer": with_shape("(2.0,)", EIGHT),
    "other digits": with_shape("(٢,)", EIGHT),
    "33 dimensions": with_shape("(" + "1, " * 32 + "1)", EIGHT[:4], (1,) * 33),
    "truth values of 2": said(npy(PLAIN.replace("<f4", "|b1"), b"\x02\x01"), "bool"),
    "another serialization": said(npy(), stype="pickle"),
    "another shape beside it": said(npy(), shape=(1, 2)),
    "another dtype beside it": said(npy(), "SECRET"),
}


def one(array, name="layer"):
    return ArrayRecord({name: array})


@pytest.mark.parametrize("array", HOSTILE.values(), ids=HOSTILE)
def test_what_numpy_does_not_write_for_numbers_is_refused_by_name(array):
    with pytest.raises(UpdateError, match="Reply refused") as caught:
        tensors_of(one(array), subject="Reply")
    assert "'layer' is not an array of numbers" in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("change", [{"data": None}, {"data": "text"}, {"shape": None}, {"shape": 5}])
def test_arrays_that_no_network_can_bring_are_refused_too(change):
    record = one(said(npy()))
    vars(record["layer"]).update(change)
    with pytest.raises(UpdateError, match="'layer' is not an array"):
        tensors_of(record, subject="Reply")


def test_nothing_is_allocated_for_a_size_that_the_bytes_do_not_have():
    array = with_shape("(100000000,)")
    tracemalloc.start()
    try:
        with pytest.raises(UpdateError):
            tensors_of(one(array), subject="Reply")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", sorted(map(str, records._DTYPES.values())))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (0, 4), (1,) * 20])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numbers_come_as_they_are(dtype, shape, order):
    array = np.asarray(np.random.default_rng(0).random(shape) * 3, order=order).astype(dtype, order=order)
    tensor = tensors_of(one(Array(array)), subject="Reply")["layer"]
    assert np.array_equal(tensor.numpy(), array)
    assert tensor.numpy().dtype == array.dtype
    assert tensor.is_contiguous()
    tensor.zero_()  # memory of its own: the record stays as it was
    assert np.array_equal(Array(array).numpy(), array)


def test_names_are_compared_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(records, "_decoded", lambda array: pytest.fail("an array was read"))
    record = ArrayRecord({"a": said(npy()), "b\n[ROUND 9/9] all is well": said(npy())})
    with pytest.raises(UpdateError) as caught:
        tensors_of(record, subject="Reply", names=["a", "c"])
    text = str(caught.value)
    assert "'c' is missing" in text
    assert r"'b\n[ROUND 9/9] all is well' is unexpected" in text
    assert "'a'" not in text


def test_of_thousands_of_names_few_are_given():
    array = said(npy())
    record = ArrayRecord({f"name {index}": array for index in range(20_000)})
    with pytest.raises(UpdateError, match="19995 more are unexpected") as caught:
        tensors_of(record, subject="Reply", names=["a"])
    assert len(str(caught.value)) < 500


def test_control_codes_in_names_are_escaped():
    name = "a\nb\x1b[2J\u202e" + "x" * 5000
    with pytest.raises(UpdateError) as caught:
        tensors_of(one(said(b""), name), subject="Reply")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.isprintable() and len(line) < 250 for line in lines)


def spec(dtype, shape=(1,)):
    return {"n": TensorSpec(shape=shape, dtype=dtype)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_count_that_is_not_finite_stays_so(value):
    came = {"n": torch.tensor([value], dtype=torch.float64)}
    result = fitted(came, spec(torch.int64))["n"]
    assert result.dtype is torch.float64
    assert not result.isfinite().any()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(2.0**63, torch.int64), (-1.5e19, torch.int64), (256.0, torch.uint8), (-1.0, torch.uint8)],
)
def test_a_count_beyond_its_dtype_stays_what_it_is(value, dtype):
    came = {"n": torch.tensor([value], dtype=torch.float64)}
    assert fitted(came, spec(dtype))["n"] is came["n"]


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (2.6, torch.int64, 3),
        (-(2.0**63), torch.int64, -(2**63)),
        (255.2, torch.uint8, 255),
        (0.5, torch.float32, 0.5),
        (1e300, torch.float32, torch.inf),
    ],
)
def test_averages_come_in_the_dtype_of_the_model(value, dtype, expected):
    result = fitted({"n": torch.tensor([value], dtype=torch.float64)}, spec(dtype))["n"]
    assert result.dtype is dtype
    assert result.item() == expected


def test_what_no_rounding_makes_fit_stays_as_it_is():
    came = {"n": torch.ones(1, dtype=torch.complex64), "other": torch.ones(1)}
    assert fitted(came, spec(torch.float32)) == came
    for dtype in (torch.bool, torch.complex64):
        assert fitted({"n": came["other"]}, spec(dtype))["n"] is came["other"]
    whole = torch.ones(1, dtype=torch.int32)
    assert fitted({"n": whole}, spec(torch.int64))["n"] is whole


@pytest.mark.parametrize(
    ("means", "agree"),
    [
        ([0.0, 1.0], True),
        ([1e-9, 1 - 1e-9], True),
        ([-1e-9, 1 + 1e-9], True),
        ([0.5, 1.0], False),
        ([2.0, 0.0], False),
        ([torch.nan, 0.0], False),
    ],
)
def test_truth_values_come_back_where_all_have_the_same(means, agree):
    mean = torch.tensor(means, dtype=torch.float64)
    result = fitted({"n": mean}, spec(torch.bool, (2,)))["n"]
    assert result.tolist() == [False, True] if agree else result is mean

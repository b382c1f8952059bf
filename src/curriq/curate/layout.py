"""Arrow columns in layouts that can be taken from, written and spelled, with the same values."""

import numpy as np
import pyarrow as pa
from pyarrow import compute, types

LISTS = (types.is_list, types.is_large_list, types.is_list_view, types.is_large_list_view)
VIEWS = (types.is_string_view, types.is_binary_view, types.is_list_view, types.is_large_list_view)


def plain_layout(array: pa.Array) -> pa.Array:
    """The array without views and without run-end encoding, also inside it; itself where there are none.

    Arrow has no `take` for text and bytes in views, writes no run-end encoding to Parquet, and casts list
    views to lists that are not valid (pyarrow 26).
    """
    kind = array.type
    if not _is_odd(kind):
        return array
    if types.is_string_view(kind):
        return array.cast(pa.large_string())
    if types.is_binary_view(kind):
        return array.cast(pa.large_binary())
    if types.is_run_end_encoded(kind):
        return _decoded(array)
    if types.is_dictionary(kind):
        values = plain_layout(array.dictionary)
        return pa.DictionaryArray.from_arrays(array.indices, values, ordered=kind.ordered)
    if types.is_struct(kind):
        children = [plain_layout(child) for child in array.flatten()]
        fields = [old.with_type(new.type) for old, new in zip(kind.fields, children, strict=True)]
        return pa.StructArray.from_arrays(children, fields=fields, mask=array.is_null())
    if types.is_map(kind):
        first, size = array.offsets[0].as_py(), array.offsets[-1].as_py() - array.offsets[0].as_py()
        keys, items = (plain_layout(part.slice(first, size)) for part in (array.keys, array.items))
        offsets = pa.array(array.offsets.to_numpy() - first, pa.int32())
        made = pa.map_(keys.type, items.type, keys_sorted=kind.keys_sorted)
        return pa.MapArray.from_arrays(offsets, keys, items, type=made, mask=array.is_null())
    if types.is_fixed_size_list(kind):
        size = kind.list_size
        values = plain_layout(array.values.slice(array.offset * size, len(array) * size))
        made = pa.list_(kind.value_field.with_type(values.type), size)
        return pa.FixedSizeListArray.from_arrays(values, type=made, mask=array.is_null())
    values = plain_layout(array.flatten())
    lengths = compute.call_function("list_value_length", [array]).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int64())
    made = pa.large_list(kind.value_field.with_type(values.type))
    return pa.LargeListArray.from_arrays(offsets, values, type=made, mask=array.is_null())


def _decoded(array: pa.RunEndEncodedArray) -> pa.Array:
    """The values of a run-end encoding, each as often as its run is long."""
    ends = array.run_ends.to_numpy()
    place = np.searchsorted(ends, np.arange(array.offset, array.offset + len(array)), side="right")
    return plain_layout(array.values).take(pa.array(place))


def _is_odd(kind: pa.DataType) -> bool:
    """Whether a type has a view or a run-end encoding in it."""
    if types.is_run_end_encoded(kind) or any(is_view(kind) for is_view in VIEWS):
        return True
    if types.is_dictionary(kind) or types.is_fixed_size_list(kind) or any(is_list(kind) for is_list in LISTS):
        return _is_odd(kind.value_type)
    if types.is_map(kind):
        return _is_odd(kind.key_type) or _is_odd(kind.item_type)
    return types.is_struct(kind) and any(_is_odd(field.type) for field in kind.fields)

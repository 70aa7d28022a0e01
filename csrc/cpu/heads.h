// Tensors of heads, [B, heads, rows, width], as projections leave them: heads in front of rows or behind, the width contiguous.
#pragma once
#include "op.h"

// The tensor itself where the numbers of a head lie side by side, else a copy.
inline Tensor with_rows(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : contiguous_copy(t); }

// Whether the heads of a row lie side by side, and not the rows of a head.
inline bool rows_first(const Tensor& t) { return t.stride(1) < t.stride(2); }

// An uninitialised [B, heads, rows, width] whose heads or, `together`, rows lie in front in memory.
inline Tensor empty_heads(ScalarType dtype, int64_t B, int64_t heads, int64_t rows, int64_t width, bool together) {
    int64_t sizes[4] = {B, heads, rows, width}, some[4];
    for (int i = 0; i < 4; i++) some[i] = std::max<int64_t>(1, sizes[i]);
    int64_t head = together ? some[3] : some[2] * some[3], row = together ? some[1] * some[3] : some[3];
    int64_t strides[4] = {some[1] * some[2] * some[3], head, row, 1};
    return empty_strided(dtype, 4, sizes, strides);
}
// One whose heads and rows lie in the order of those of `like`.
inline Tensor empty_heads(const Tensor& like, int64_t width) {
    return empty_heads(like.scalar_type(), like.size(0), like.size(1), like.size(2), width, rows_first(like));
}

// Tensors of heads, [B, heads, rows, width], as projections leave them: heads in front of rows or behind, the width contiguous.
#pragma once
#include "op.h"

// The tensor itself where the numbers of a head lie side by side, else a copy.
inline Tensor with_rows(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : contiguous_copy(t); }

// Whether the heads of a row lie side by side, and not the rows of a head.
inline bool rows_first(const Tensor& t) { return t.stride(1) < t.stride(2); }

// An uninitialised [B, heads, rows, width] whose heads and rows lie in memory in the order of those of `like`.
inline Tensor empty_heads(const Tensor& like, int64_t width) {
    int64_t sizes[4] = {like.size(0), like.size(1), like.size(2), width}, some[4];
    for (int i = 0; i < 4; i++) some[i] = std::max<int64_t>(1, sizes[i]);
    int64_t head = rows_first(like) ? some[3] : some[2] * some[3], row = rows_first(like) ? some[1] * some[3] : some[3];
    int64_t strides[4] = {some[1] * some[2] * some[3], head, row, 1};
    return empty_strided(like.scalar_type(), 4, sizes, strides);
}

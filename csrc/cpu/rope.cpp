// rope: pairs of numbers turned by the angle of their position, one pass over memory.
//
// A row of cosines and one of sines, P numbers each, serve all heads of a position; they stay in the L1 cache while heads of a position lie
// side by side, and in L2 otherwise.
// Halves need no shuffle: the partners of a vector of first numbers are a vector, P further. Interleaved pairs are sorted into two vectors
// in registers and back. The backward is the same with sines of the other sign.
#include "heads.h"
#include "rotation.h"
#include "rows.h"

namespace {

constexpr const char* ROPE = "rope";

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) {
    int64_t B = ranked(ROPE, "x", x, 4).size(0), H = x.size(1), T = x.size(2), D = x.size(3);
    checked(ROPE, "x", x, x.scalar_type(), {B, H, T, D});
    int64_t P = ranked(ROPE, "cos", cos, 3).size(2), batches = cos.size(0) == 1 ? 1 : B;
    checked(ROPE, "cos", cos, statistics_type(x), {batches, T, P});
    checked(ROPE, "sin", sin, statistics_type(x), {batches, T, P});
    if (2 * P > D) fail(ROPE, ": cos has ", P, " angles, needs at most ", D / 2, " for heads of ", D);
    Tensor from = with_rows(x), coss = dense(cos), sins = dense(sin), y = empty_heads(from, D);
    const bool together = rows_first(y);
    Rotation rotation{P, D, interleaved, inverse};
    with_type(ROPE, x.scalar_type(), [&](auto type) {
        using N = decltype(type);
        using C = compute_t<N>;
        auto in = static_cast<const N*>(from.data_ptr());
        auto out = static_cast<N*>(y.data_ptr());
        auto c = static_cast<const C*>(coss.data_ptr()), s = static_cast<const C*>(sins.data_ptr());
        int64_t inner = together ? H : T, outer = together ? T : H;
        auto strip = [&](int64_t m) {  // the rows that lie side by side in y
            int64_t b = m / outer, o = m % outer;
            for (int64_t i = 0; i < inner; i++) {
                int64_t h = together ? i : o, t = together ? o : i, place = ((batches == 1 ? 0 : b) * T + t) * P;
                const N* source = in + b * from.stride(0) + h * from.stride(1) + t * from.stride(2);
                rotation.row(source, out + b * y.stride(0) + h * y.stride(1) + t * y.stride(2), c + place, s + place);
            }
        };
        each_row(B * outer, inner * D, strip);
    });
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) { m.impl("rope", TORCH_BOX(&rope)); }

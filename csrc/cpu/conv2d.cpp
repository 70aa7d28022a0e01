// conv2d: y = act(x * weight + b) and its gradients. What is computed stands in conv2d.h, weight_gradient.h and depthwise.h; here, arguments
// are checked.
#include "conv2d.h"
#include "convolution.h"
#include "depthwise.h"
#include "weight_gradient.h"

namespace {

constexpr const char* FORWARD = "conv2d_forward";
constexpr const char* BACKWARD = "conv2d_backward";

template <class T, Memory MEMORY>
void sums_and_slopes(const Channels<T, MEMORY>& all, Activation act, const T* dy, const T* saved, T* dz, T* dbias) {
    using All = Channels<T, MEMORY>;
    using S = compute_t<T>;
    int64_t groups = all.groups(), blocks = all.blocks();
    std::vector<S> partial(blocks * all.padded());
    act.with_few<S>([&](auto, auto gradient) {
        parallel(groups * blocks, [&](int64_t i, int64_t end) {
            for (; i < end; i++) {
                int64_t g = i % groups, b = i / groups;
                typename All::Sums sums;
                all.each_vector(g, b * All::BLOCK, b * All::BLOCK + all.size_of_block(b), [&](int v, int64_t at, int lanes) INLINE {
                    auto d = load(dy + at, lanes);
                    if (saved) d = keep(gradient(d, load(saved + at, lanes)), lanes);
                    if (dz) store(dz + at, d, lanes);
                    sums.v[v] += d;
                });
                sums.to(partial.data() + b * all.padded() + g * All::GROUP);
            }
        }, all.serial());
    });
    for (int64_t o = 0; dbias && o < all.channels; o++) {
        S total = 0;
        for (int64_t b = 0; b < blocks; b++) total += partial[b * all.padded() + o];
        put_one(dbias + o, total);
    }
}

// f(T{}, memory) for a dtype and an order of memory.
template <class F> void with_kind(const char* op, const Tensor& x, Memory memory, const F& f) {
    with_type(op, x.scalar_type(), [&](auto type) {
        if (memory == Memory::COLUMNS) f(type, std::integral_constant<Memory, Memory::COLUMNS>{});
        else f(type, std::integral_constant<Memory, Memory::ROWS>{});
    });
}

// The format of filters, which s is told.
Format format_of_filters(const char* op, const Tensor& weight, Geometry& s) {
    Format format = format_of(op, weight);
    bool columns = format.memory == Memory::COLUMNS;
    s.to_channel = columns ? 1 : s.R * s.S, s.to_tap = columns ? s.C1 : 1;
    return format;
}

Format lay_out(Memory memory, int64_t C, int64_t H, int64_t W) {
    C = std::max<int64_t>(C, 1), H = std::max<int64_t>(H, 1), W = std::max<int64_t>(W, 1);
    if (memory == Memory::COLUMNS) return {memory, 4, {H * W * C, 1, W * C, C}};
    return {memory, 4, {C * H * W, H * W, W, 1}};
}

}  // namespace

Geometry checked_geometry(const char* op, int64_t N, int64_t C, int64_t H, int64_t W, const Tensor& weight, const Ints& stride,
                          const Ints& padding, const Ints& dilation, int64_t groups) {
    constexpr int64_t LARGEST = int64_t(1) << 31;  // of a number that positions in an image are computed from
    auto numbers = [&](const char* name, const Ints& given, size_t count, int64_t least) {
        if (given.size() != count) fail(op, ": ", name, " has ", given.size(), " numbers, needs ", count);
        for (int64_t n : given)
            if (n < least || n > LARGEST) fail(op, ": ", name, " has ", n, ", needs ", least, " to 2^31");
    };
    numbers("stride", stride, 2, 1), numbers("padding", padding, 4, 0), numbers("dilation", dilation, 2, 1);
    numbers("groups", {groups}, 1, 1);
    Geometry s{N, C, H, W, weight.size(0), weight.size(2), weight.size(3), groups};
    if (s.C % groups || s.O % groups) fail(op, ": groups is ", groups, ", needs a divisor of ", s.C, " and ", s.O, " channels");
    s.C1 = s.C / groups, s.O1 = s.O / groups;
    for (int d = 0; d < 2; d++) {
        int64_t size = d ? s.W : s.H, taps = d ? s.S : s.R;
        if (taps < 1 || size > LARGEST || taps > LARGEST)
            fail(op, ": images of ", H, " x ", W, " pixels and weight ", shape_text(weight), ", needs 1 to 2^31 taps and pixels");
        s.stride[d] = stride[d], s.before[d] = padding[2 * d], s.dilation[d] = dilation[d];
        int64_t room = size + padding[2 * d] + padding[2 * d + 1], span = (taps - 1) * dilation[d] + 1;  // below 2^63: factors up to 2^31
        if (room < span) fail(op, ": a filter that spans ", span, " does not fit into ", room, " padded pixels");
        (d ? s.Q : s.P) = (room - span) / stride[d] + 1;
    }
    return s;
}

Tensor images(const Tensor& like, Memory memory, int64_t N, int64_t C, int64_t H, int64_t W) {
    int64_t sizes[] = {N, C, H, W};
    return empty_strided(like.scalar_type(), 4, sizes, lay_out(memory, C, H, W).strides);
}
Tensor in_memory(const Tensor& t, Memory memory) { return in_format(t, lay_out(memory, t.size(1), t.size(2), t.size(3))); }

void convolve(const char* op, Geometry s, Memory memory, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              Activation act, const Tensor& y, const Tensor& z) {
    if (s.N * s.O * s.P * s.Q == 0) return;
    Tensor xs = in_memory(x, memory), ws = in_format(weight, format_of_filters(op, weight, s)), bs = bias ? dense(*bias) : Tensor();
    with_kind(op, x, memory, [&](auto type, auto kind) {
        using T = decltype(type);
        if (s.own_filters()) OwnFilters<T, kind>{s}.forward(data<T>(xs), data<T>(ws), data<T>(bs), act, data<T>(y), data<T>(z));
        else forward<T, kind>(s, data<T>(xs), data<T>(ws), data<T>(bs), act, data<T>(y), data<T>(z));
    });
}

void convolve_back(const char* op, Geometry s, Memory memory, const Tensor& dz, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& dx) {
    Tensor zs = in_memory(dz, memory), ws = in_format(weight, format_of_filters(op, weight, s)), bs = bias ? dense(*bias) : Tensor();
    with_kind(op, dz, memory, [&](auto type, auto kind) {
        using T = decltype(type);
        if (s.own_filters()) OwnFilters<T, kind>{s}.input_gradient(data<T>(zs), data<T>(ws), data<T>(bs), data<T>(dx));
        else input_gradient<T, kind>(s, data<T>(zs), data<T>(ws), data<T>(bs), data<T>(dx));
    });
}

Tensor filter_gradient(const char* op, Geometry s, Memory memory, const Tensor& dz, const Tensor& x, const Tensor& weight) {
    with_type(op, x.scalar_type(), [&](auto type) { if (has_few_places<decltype(type)>(s)) memory = Memory::COLUMNS; });
    Tensor zs = in_memory(dz, memory), xs = in_memory(x, memory), dweight = empty(weight, format_of_filters(op, weight, s));
    with_kind(op, x, memory, [&](auto type, auto kind) {
        using T = decltype(type);
        if (s.own_filters()) OwnFilters<T, kind>{s}.weight_gradient(data<T>(zs), data<T>(xs), data<T>(dweight));
        else weight_gradient<T, kind>(s, data<T>(zs), data<T>(xs), data<T>(dweight));
    });
    return dweight;
}

void activation_gradient(const char* op, Memory memory, Activation act, const Tensor& dy, const Tensor& saved, const Tensor& dz,
                         const Tensor& dbias) {
    with_kind(op, dy, memory, [&](auto type, auto kind) {
        using T = decltype(type);
        Channels<T, kind> all{dy.size(0), dy.size(1), dy.size(2) * dy.size(3)};
        sums_and_slopes<T, kind>(all, act, data<T>(dy), data<T>(saved), data<T>(dz), data<T>(dbias));
    });
}

// ---- the ops, with every argument checked -----------------------------------------------------------------------------------------

namespace {

Geometry checked_call(const char* op, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
                      int64_t groups, bool winograd) {
    ranked(op, "x", x, 4), ranked(op, "weight", weight, 4);
    Geometry s = checked_geometry(op, x.size(0), x.size(1), x.size(2), x.size(3), weight, stride, padding, dilation, groups);
    s.winograd = winograd;
    checked(op, "x", x, x.scalar_type(), {s.N, s.C, s.H, s.W});
    checked(op, "weight", weight, x.scalar_type(), {s.O, s.C1, s.R, s.S});
    return s;
}

std::tuple<Tensor, Tensor> conv2d_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding, Ints dilation,
                                          int64_t groups, bool winograd, int64_t activation, double slope, bool save) {
    Geometry s = checked_call(FORWARD, x, weight, stride, padding, dilation, groups, winograd);
    if (bias) checked(FORWARD, "bias", *bias, x.scalar_type(), {s.O});
    Activation act = checked_activation(FORWARD, activation, slope);
    Memory memory = format_of(FORWARD, x).memory;
    Tensor y = images(x, memory, s.N, s.O, s.P, s.Q), z = save ? images(x, memory, s.N, s.O, s.P, s.Q) : Tensor();
    convolve(FORWARD, s, memory, x, weight, bias, act, y, z);
    return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> saved, Ints stride,
                                                   Ints padding, Ints dilation, int64_t groups, bool winograd, int64_t activation,
                                                   double slope, bool need_dx, bool need_dweight, bool need_dbias) {
    Geometry s = checked_call(BACKWARD, x, weight, stride, padding, dilation, groups, winograd);
    checked(BACKWARD, "dy", dy, x.scalar_type(), {s.N, s.O, s.P, s.Q});
    Activation act = checked_activation(BACKWARD, activation, slope);
    if (act.code != NONE && !saved) fail(BACKWARD, ": saved is None, needs what conv2d_forward kept for activation ", activation);
    if (act.code != NONE) checked(BACKWARD, "saved", *saved, x.scalar_type(), {s.N, s.O, s.P, s.Q});
    Memory memory = format_of(BACKWARD, x).memory;
    Tensor dx = need_dx ? images(x, memory, s.N, s.C, s.H, s.W) : Tensor(), dweight, dbias = need_dbias ? empty(x, {s.O}) : Tensor();
    Tensor d = in_memory(dy, memory), kept = act.code == NONE ? Tensor() : in_memory(*saved, memory), dz;
    if (act.code != NONE && (need_dx || need_dweight)) dz = images(x, memory, s.N, s.O, s.P, s.Q);
    if (act.code != NONE || need_dbias) activation_gradient(BACKWARD, memory, act, d, kept, dz, dbias);
    const Tensor& slopes = dz.defined() ? dz : d;
    if (need_dx) convolve_back(BACKWARD, s, memory, slopes, weight, {}, dx);
    if (need_dweight) dweight = filter_gradient(BACKWARD, s, memory, slopes, x, weight);
    return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("conv2d_forward", TORCH_BOX(&conv2d_forward));
    m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward));
}

// conv2d: y = act(x * weight + b) and its gradients. What is computed stands in conv2d.h and depthwise.h; here, arguments are checked.
#include "conv2d.h"
#include "depthwise.h"

namespace {

constexpr const char* FORWARD = "conv2d_forward";
constexpr const char* BACKWARD = "conv2d_backward";

// One pass over dy and saved for what is not null: dz = dy act'(saved), and dbias, its sum over each channel.
template <class T, Memory MEMORY>
void activation_gradient(const Geometry& s, Activation act, const T* dy, const T* saved, T* dz, T* dbias) {
    using All = Channels<T, MEMORY>;
    using S = compute_t<T>;
    All all{s.N, s.O, s.P * s.Q};
    int64_t groups = all.groups(), blocks = all.blocks();
    std::vector<S> partial(blocks * all.padded());
    act.with<S>([&](auto, auto gradient) {
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
    for (int64_t o = 0; dbias && o < s.O; o++) {
        S total = 0;
        for (int64_t b = 0; b < blocks; b++) total += partial[b * all.padded() + o];
        put_one(dbias + o, total);
    }
}

// ---- the ops, with every argument checked -----------------------------------------------------------------------------------------

using Ints = std::vector<int64_t>;

Geometry checked_geometry(const char* op, const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                          const Ints& dilation, int64_t groups) {
    constexpr int64_t LARGEST = int64_t(1) << 31;  // of a number that positions in an image are computed from
    ranked(op, "x", x, 4), ranked(op, "weight", weight, 4);
    auto numbers = [&](const char* name, const Ints& given, size_t count, int64_t least) {
        if (given.size() != count) fail(op, ": ", name, " has ", given.size(), " numbers, needs ", count);
        for (int64_t n : given)
            if (n < least || n > LARGEST) fail(op, ": ", name, " has ", n, ", needs ", least, " to 2^31");
    };
    numbers("stride", stride, 2, 1), numbers("padding", padding, 4, 0), numbers("dilation", dilation, 2, 1);
    numbers("groups", {groups}, 1, 1);
    Geometry s{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0), weight.size(2), weight.size(3), groups};
    if (s.C % groups || s.O % groups) fail(op, ": groups is ", groups, ", needs a divisor of ", s.C, " and ", s.O, " channels");
    s.C1 = s.C / groups, s.O1 = s.O / groups;
    for (int d = 0; d < 2; d++) {
        int64_t size = d ? s.W : s.H, taps = d ? s.S : s.R;
        if (taps < 1 || size > LARGEST || taps > LARGEST)
            fail(op, ": x has shape ", shape_text(x), " and weight ", shape_text(weight), ", needs 1 to 2^31 taps and pixels");
        s.stride[d] = stride[d], s.before[d] = padding[2 * d], s.dilation[d] = dilation[d];
        int64_t room = size + padding[2 * d] + padding[2 * d + 1], span = (taps - 1) * dilation[d] + 1;  // below 2^63: factors up to 2^31
        if (room < span) fail(op, ": a filter that spans ", span, " does not fit into ", room, " padded pixels");
        (d ? s.Q : s.P) = (room - span) / stride[d] + 1;
    }
    checked(op, "x", x, x.scalar_type(), {s.N, s.C, s.H, s.W});
    checked(op, "weight", weight, x.scalar_type(), {s.O, s.C1, s.R, s.S});
    return s;
}

// The filters as they lie, in one of the two formats, which s is told.
Tensor filters(const char* op, const Tensor& weight, Geometry& s) {
    Format format = format_of(op, weight);
    bool columns = format.memory == Memory::COLUMNS;
    s.to_channel = columns ? 1 : s.R * s.S, s.to_tap = columns ? s.C1 : 1;
    return in_format(weight, format);
}

// f(T{}, memory) for the dtype and the format of x.
template <class F> void with_kind(const char* op, const Tensor& x, const Format& format, const F& f) {
    with_type(op, x.scalar_type(), [&](auto type) {
        if (format.memory == Memory::COLUMNS) f(type, std::integral_constant<Memory, Memory::COLUMNS>{});
        else f(type, std::integral_constant<Memory, Memory::ROWS>{});
    });
}

Format lay_out(Memory memory, int64_t C, int64_t H, int64_t W) {
    C = std::max<int64_t>(C, 1), H = std::max<int64_t>(H, 1), W = std::max<int64_t>(W, 1);
    if (memory == Memory::COLUMNS) return {memory, 4, {H * W * C, 1, W * C, C}};
    return {memory, 4, {C * H * W, H * W, W, 1}};
}
Tensor images(const Tensor& x, const Format& format, std::initializer_list<int64_t> shape) {
    return empty_strided(x.scalar_type(), 4, shape.begin(), format.strides);
}

std::tuple<Tensor, Tensor> conv2d_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding, Ints dilation,
                                          int64_t groups, int64_t activation, double slope, bool save) {
    Geometry s = checked_geometry(FORWARD, x, weight, stride, padding, dilation, groups);
    if (bias) checked(FORWARD, "bias", *bias, x.scalar_type(), {s.O});
    Activation act = checked_activation(FORWARD, activation, slope);
    Format format = format_of(FORWARD, x), of_y = lay_out(format.memory, s.O, s.P, s.Q);
    Tensor y = images(x, of_y, {s.N, s.O, s.P, s.Q}), z = save ? images(x, of_y, {s.N, s.O, s.P, s.Q}) : Tensor();
    if (s.N * s.O * s.P * s.Q == 0) return {y, z};
    Tensor xs = in_format(x, format), ws = filters(FORWARD, weight, s), bs = bias ? dense(*bias) : Tensor();
    with_kind(FORWARD, x, format, [&](auto type, auto memory) {
        using T = decltype(type);
        if (s.own_filters()) OwnFilters<T, memory>{s}.forward(data<T>(xs), data<T>(ws), data<T>(bs), act, data<T>(y), data<T>(z));
        else forward<T, memory>(s, data<T>(xs), data<T>(ws), data<T>(bs), act, data<T>(y), data<T>(z));
    });
    return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> saved, Ints stride,
                                                   Ints padding, Ints dilation, int64_t groups, int64_t activation, double slope,
                                                   bool need_dx, bool need_dweight, bool need_dbias) {
    Geometry s = checked_geometry(BACKWARD, x, weight, stride, padding, dilation, groups);
    checked(BACKWARD, "dy", dy, x.scalar_type(), {s.N, s.O, s.P, s.Q});
    Activation act = checked_activation(BACKWARD, activation, slope);
    if (act.code != NONE && !saved) fail(BACKWARD, ": saved is None, needs what conv2d_forward kept for activation ", activation);
    if (act.code != NONE) checked(BACKWARD, "saved", *saved, x.scalar_type(), {s.N, s.O, s.P, s.Q});
    Format format = format_of(BACKWARD, x), of_y = lay_out(format.memory, s.O, s.P, s.Q);
    Tensor dx = need_dx ? images(x, format, {s.N, s.C, s.H, s.W}) : Tensor(), dweight = need_dweight ? empty(weight) : Tensor();
    Tensor dbias = need_dbias ? empty(x, {s.O}) : Tensor();
    Tensor d = in_format(dy, of_y), kept = act.code == NONE ? Tensor() : in_format(*saved, of_y), dz = d;
    bool writes_dz = act.code != NONE && (need_dx || need_dweight);
    if (writes_dz) dz = images(x, of_y, {s.N, s.O, s.P, s.Q});
    Tensor xs = need_dweight ? in_format(x, format) : x, ws = need_dx ? filters(BACKWARD, weight, s) : weight;
    with_kind(BACKWARD, x, format, [&](auto type, auto memory) {
        using T = decltype(type);
        if (act.code != NONE || need_dbias)
            activation_gradient<T, memory>(s, act, data<T>(d), data<T>(kept), writes_dz ? data<T>(dz) : nullptr, data<T>(dbias));
        if (s.own_filters()) {
            OwnFilters<T, memory> own{s};
            if (need_dx) own.input_gradient(data<T>(dz), data<T>(ws), data<T>(dx));
            if (need_dweight) own.weight_gradient(data<T>(dz), data<T>(xs), data<T>(dweight));
        } else {
            if (need_dx) input_gradient<T, memory>(s, data<T>(dz), data<T>(ws), data<T>(dx));
            if (need_dweight) weight_gradient<T, memory>(s, data<T>(dz), data<T>(xs), data<T>(dweight));
        }
    });
    return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("conv2d_forward", TORCH_BOX(&conv2d_forward));
    m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward));
}

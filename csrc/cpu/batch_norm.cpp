// batch_norm: y = act((x - mean) weight rstd + bias) with mean and variance of each channel, over the whole batch or given.
//
//   statistics   per piece: a centre, which is the mean of its first eighth, and sums of d = x - centre and d^2. Cancellation in
//                sum d^2 - (sum d)^2 / n costs at most 3 bits, whatever the mean: if the centre is far off, the eighth alone has that much
//                variance. Equal numbers have variance 0. Pieces are joined in double, in order (Chan et al. 1979).
//   normalise    while the channel is in the cache, last block first
//   backward     the same two phases: sums of dz and dz (x - mean); dx = scale (dz - a - (x - mean) b) with a and b per channel
//
// relu's mask is that of y, formed again from x: cheaper than reading y.
#include <cmath>

#include "channels.h"

namespace {

constexpr const char *TRAIN = "batch_norm_train", *EVAL = "batch_norm_eval", *BACKWARD = "batch_norm_backward";
// z <= this becomes y <= 0: what relu cuts, and what rounds to zero in storage.
template <class T> constexpr float CUT = 0;
template <> constexpr float CUT<f16> = 0x1p-25f;

// What is the same for all numbers of a channel, in arrays over channels padded to whole groups.
template <class C> struct Parameters {
    std::vector<C> memory;
    C *mean, *scale, *bias, *a, *b;
    explicit Parameters(int64_t padded) : memory(5 * padded) {
        C* p = memory.data();
        for (C** array : {&mean, &scale, &bias, &a, &b}) *array = p, p += padded;
    }
};

// stats [3, C]: mean, var, and the rest of the mean, what rounding it left out. The backward needs nothing else.
template <class C> struct Statistics {
    C *mean, *var, *rest;
    Statistics(void* stats, int64_t channels) : mean(static_cast<C*>(stats)), var(mean + channels), rest(var + channels) {}
    void rstd(int64_t c, int n, double eps, double* to) const {
        for (int i = 0; i < n; i++) to[i] = 1 / std::sqrt(double(var[c + i]) + eps);
    }
};

template <class V> inline V relu(V z) { return z < 0 ? V{} : z; }  // NaN passes

struct Arguments {
    PerChannel weight, bias, running_mean, running_var;
    double momentum, eps;
};

// Means, then sums of squared deviations, of block b for every channel of group g, into out[2][GROUP].
template <class K, class T> void block_moments(const K& k, const T* x, int64_t g, int64_t b, double* out) {
    using C = typename K::C;
    Moments<K::GROUP> found;
    const int64_t ahead = k.ahead();
    k.each_piece(b, [&](int64_t begin, int64_t end) {
        alignas(64) C some[K::GROUP] = {}, sums[K::GROUP], centre[K::GROUP], squares[K::GROUP];
        k.each_run(g, begin, begin + 1, [&](int64_t at, int64_t length) {
            for (int c = 0; c < std::min<int>(K::GROUP, length); c += K::L)
                store(some + c, load(x + at + c, std::min<int>(K::GROUP, length) - c), K::GROUP - c);
        });
        typename K::Quad start(some);
        typename K::Sums rough;
        int64_t part = std::min(end - begin, K::PIECE / 8);
        k.each_vector(g, begin, begin + part, [&](int i, int64_t at, int lanes) INLINE {
            rough.v[i] += keep(load(x + at, lanes) - start.v[i], lanes);
        });
        rough.to(centre);
        for (int c = 0; c < K::GROUP; c++) centre[c] = some[c] + centre[c] / part;
        typename K::Quad m(centre);
        typename K::Sums first, second;
        k.each_vector(g, begin, end, [&](int i, int64_t at, int lanes) INLINE {
            k.fetch(i, x + at + ahead);
            auto d = keep(load(x + at, lanes) - m.v[i], lanes);
            first.v[i] += d, second.v[i] += d * d;
        });
        first.to(sums), second.to(squares);
        double n = end - begin, mean[K::GROUP], m2[K::GROUP];
        for (int c = 0; c < K::GROUP; c++) {
            mean[c] = centre[c] + sums[c] * (1 / n);
            m2[c] = squares[c] - double(sums[c]) * sums[c] * (1 / n);
        }
        found.join(n, mean, m2);
    });
    std::copy_n(found.mean, K::GROUP, out), std::copy_n(found.m2, K::GROUP, out + K::GROUP);
}

template <bool RELU, class K, class T>
void normalise(const K& k, const Parameters<typename K::C>& p, const T* x, T* y, int64_t g, int64_t begin, int64_t end, int64_t ahead) {
    typename K::Quad mean(p.mean + g * K::GROUP), scale(p.scale + g * K::GROUP), bias(p.bias + g * K::GROUP);
    k.each_vector(g, begin, end, [&](int i, int64_t at, int lanes) INLINE {
        k.template fetch<1>(i, y + at + ahead);
        auto z = (load(x + at, lanes) - mean.v[i]) * scale.v[i] + bias.v[i];
        store(y + at, RELU ? relu(z) : z, lanes);
    });
}

// The part of a number that the rest of the mean accounts for: nothing where there are infinities, which it could only turn into NaN.
inline double finite(double correction) { return correction - correction == 0 ? correction : 0; }

// Mean, scale and bias of the `n` channels from c on, from their statistics.
template <class K>
void set(const Parameters<typename K::C>& p, int64_t c, int n, const Arguments& args, const Statistics<typename K::C>& stats) {
    double weight[K::GROUP], bias[K::GROUP], rstd[K::GROUP];
    args.weight.read(c, n, weight, 1), args.bias.read(c, n, bias, 0), stats.rstd(c, n, args.eps, rstd);
    for (int i = 0; i < n; i++) weight[i] *= rstd[i], bias[i] -= finite(stats.rest[c + i] * weight[i]);
    std::copy_n(stats.mean + c, n, p.mean + c), std::copy_n(weight, n, p.scale + c), std::copy_n(bias, n, p.bias + c);
}

template <bool RELU, class K, class T>
void forward(const K& k, const Arguments& args, bool training, const T* x, T* y, const Statistics<typename K::C>& stats) {
    Parameters<typename K::C> p(k.padded());
    std::vector<double> workspace(training ? 2 * k.padded() * k.blocks() : 0);
    auto block = [&](int64_t g, int64_t b) { return workspace.data() + 2 * (b * k.padded() + g * K::GROUP); };
    auto first = [&](int64_t g, int64_t b) { block_moments(k, x, g, b, block(g, b)); };
    auto middle = [&](int64_t g) {
        int64_t at = g * K::GROUP;
        int n = k.size_of_group(g);
        double mean[K::GROUP], var[K::GROUP];
        args.running_mean.read(at, n, mean, 0), args.running_var.read(at, n, var, 1);
        if (training) {
            Moments<K::GROUP> total;
            for (int64_t b = 0; b < k.blocks(); b++) total.join(k.size_of_block(b), block(g, b), block(g, b) + K::GROUP);
            double part = args.momentum, old = 1 - part, unbiased = part / (k.count() - 1);
            for (int c = 0; c < n; c++) mean[c] = part * total.mean[c] + old * mean[c], var[c] = unbiased * total.m2[c] + old * var[c];
            args.running_mean.write(at, n, mean), args.running_var.write(at, n, var);
            for (int c = 0; c < n; c++) mean[c] = total.mean[c], var[c] = total.m2[c] / k.count();
        }
        for (int c = 0; c < n; c++) {
            stats.mean[at + c] = mean[c], stats.var[at + c] = var[c];
            stats.rest[at + c] = mean[c] - stats.mean[at + c];
        }
        set<K>(p, at, n, args, stats);
    };
    int64_t ahead = training ? k.ahead() : 16 * K::WIDTH;  // alone, the map goes through memory in order
    auto map = [&](int64_t g, int64_t begin, int64_t end) { normalise<RELU>(k, p, x, y, g, begin, end, ahead); };
    training ? k.phases(first, middle, map) : k.one_phase(middle, map);
}

// dz = dy where relu passed z, 0 where it did not.
template <bool RELU, class T, class V> inline V through_relu(V dy, V centred, V scale, V bias) {
    return RELU ? centred * scale + bias <= V{} + CUT<T> ? V{} : dy : dy;
}

// Sums of dz, then of dz (x - mean), over block b for every channel of group g, into out[2][GROUP].
template <bool RELU, class K, class T>
void block_sums(const K& k, const Parameters<typename K::C>& p, const T* dy, const T* x, int64_t g, int64_t b, double* out) {
    using C = typename K::C;
    typename K::Quad mean(p.mean + g * K::GROUP), scale(p.scale + g * K::GROUP), bias(p.bias + g * K::GROUP);
    std::fill_n(out, 2 * K::GROUP, 0);
    const int64_t ahead = k.ahead();
    k.each_piece(b, [&](int64_t begin, int64_t end) {
        alignas(64) C sums[2 * K::GROUP];
        typename K::Sums plain, weighted;
        k.each_vector(g, begin, end, [&](int i, int64_t at, int lanes) INLINE {
            k.fetch(i, x + at + ahead), k.fetch(i, dy + at + ahead);
            auto centred = load(x + at, lanes) - mean.v[i];
            auto dz = through_relu<RELU, T>(load(dy + at, lanes), centred, scale.v[i], bias.v[i]);
            plain.v[i] += dz, weighted.v[i] += keep(dz * centred, lanes);
        });
        plain.to(sums), weighted.to(sums + K::GROUP);
        for (int c = 0; c < 2 * K::GROUP; c++) out[c] += sums[c];
    });
}

template <bool RELU, class K, class T>
void input_gradient(const K& k, const Parameters<typename K::C>& p, bool training, const T* dy, const T* x, T* dx, int64_t g, int64_t begin,
                    int64_t end) {
    typename K::Quad mean(p.mean + g * K::GROUP), scale(p.scale + g * K::GROUP), bias(p.bias + g * K::GROUP);
    typename K::Quad pa(p.a + g * K::GROUP), pb(p.b + g * K::GROUP);
    auto dz = [&](int i, int64_t at, int lanes, auto centred) INLINE {
        return through_relu<RELU, T>(load(dy + at, lanes), centred, scale.v[i], bias.v[i]);
    };
    const int64_t ahead = k.ahead();
    if (training)
        k.each_vector(g, begin, end, [&](int i, int64_t at, int lanes) INLINE {
            k.template fetch<1>(i, dx + at + ahead);
            auto centred = load(x + at, lanes) - mean.v[i];
            store(dx + at, scale.v[i] * (dz(i, at, lanes, centred) - pa.v[i] - centred * pb.v[i]), lanes);
        });
    else
        k.each_vector(g, begin, end, [&](int i, int64_t at, int lanes) INLINE {
            auto centred = RELU ? load(x + at, lanes) - mean.v[i] : mean.v[i];  // without relu no need to read x
            store(dx + at, scale.v[i] * dz(i, at, lanes, centred), lanes);
        });
}

template <bool RELU, class K, class T>
void backward(const K& k, const Arguments& args, bool training, const T* dy, const T* x, const Statistics<typename K::C>& stats,
              T* dx, const PerChannel& dweight, const PerChannel& dbias) {
    Parameters<typename K::C> p(k.padded());
    for (int64_t g = 0; g < k.groups(); g++) set<K>(p, g * K::GROUP, k.size_of_group(g), args, stats);
    bool sums = training || dweight.p || dbias.p;
    std::vector<double> workspace(sums ? 2 * k.padded() * k.blocks() : 0);
    auto block = [&](int64_t g, int64_t b) { return workspace.data() + 2 * (b * k.padded() + g * K::GROUP); };
    auto first = [&](int64_t g, int64_t b) { block_sums<RELU>(k, p, dy, x, g, b, block(g, b)); };
    auto middle = [&](int64_t g) {
        int64_t at = g * K::GROUP;
        int n = sums ? k.size_of_group(g) : 0;
        double plain[K::GROUP] = {}, weighted[K::GROUP] = {}, rstd[K::GROUP];
        stats.rstd(at, n, args.eps, rstd);
        for (int64_t b = 0; sums && b < k.blocks(); b++)
            for (int c = 0; c < K::GROUP; c++) plain[c] += block(g, b)[c], weighted[c] += block(g, b)[K::GROUP + c];
        for (int c = 0; c < n; c++) {
            double rest = stats.rest[at + c];
            weighted[c] = (weighted[c] - finite(rest * plain[c])) * rstd[c];
            double b = weighted[c] * rstd[c] / k.count();
            p.b[at + c] = b;
            p.a[at + c] = plain[c] / k.count() - finite(rest * b) + 0 * p.scale[at + c];  // no mean of dz scale where that is infinite
        }
        dbias.write(at, n, plain), dweight.write(at, n, weighted);
    };
    auto map = [&](int64_t g, int64_t begin, int64_t end) { if (dx) input_gradient<RELU>(k, p, training, dy, x, dx, g, begin, end); };
    sums ? k.phases(first, middle, map) : k.one_phase(middle, map);
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

// f(type, K) with the storage type and the view of x as channels.
template <class F> void with_channels(const char* op, const Tensor& x, const Format& format, bool relu, const F& f) {
    int64_t N = x.size(0), S = 1;
    for (int64_t d = 2; d < format.rank; d++) S *= x.size(d);
    with_type(op, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        auto with_relu = [&](auto k) { relu ? f(type, k, std::true_type{}) : f(type, k, std::false_type{}); };
        if (format.memory == Memory::COLUMNS) with_relu(Channels<T, Memory::COLUMNS>{N, x.size(1), S});
        else with_relu(Channels<T, Memory::ROWS>{N, x.size(1), S});
    });
}

// x as every op takes it; its format.
Format checked_input(const char* op, const Tensor& x) {
    Format format = format_of(op, x);
    if (!x.is_cpu()) fail(op, ": x is not on the cpu, where this kernel runs");
    if (x.layout() != torch::headeronly::Layout::Strided) fail(op, ": x must be a strided tensor");
    return format;
}

using Optional = std::optional<Tensor>;
std::tuple<Tensor, Tensor> run_forward(const char* op, const Tensor& x, const Optional& weight, const Optional& bias, const Optional& mean,
                                       const Optional& var, bool training, double momentum, double eps, bool relu) {
    Format format = checked_input(op, x);
    checked_parameters(op, x, {{"weight", weight}, {"bias", bias}, {"running_mean", mean}, {"running_var", var}});
    Arguments args = {PerChannel(weight), PerChannel(bias), PerChannel(mean), PerChannel(var), momentum, eps};
    with_type(op, x.scalar_type(), [](auto) {});
    if (x.numel() <= (training ? x.size(1) : 0))
        fail(op, ": x has shape ", shape_text(x), ", needs ", training ? "more than one number per channel" : "at least one number");
    if (eps < 0 || (training && eps == 0)) fail(op, ": eps is ", eps, ", needs to be ", training ? "positive" : "at least 0");
    if (mean.has_value() != var.has_value()) fail(op, ": running_mean and running_var must both be tensors or both be None");
    int64_t sizes[] = {3, x.size(1)}, strides[] = {x.size(1), 1};
    Tensor y = empty(x, format), stats = empty_strided(statistics_type(x), 2, sizes, strides);
    Tensor xs = in_format(x, format);
    with_channels(op, x, format, relu, [&](auto type, auto k, auto with_relu) {
        using T = decltype(type);
        forward<with_relu.value>(k, args, training, static_cast<const T*>(xs.data_ptr()), static_cast<T*>(y.data_ptr()),
                                 Statistics<compute_t<T>>(stats.data_ptr(), x.size(1)));
    });
    return {y, stats};
}

std::tuple<Tensor, Tensor> batch_norm_train(Tensor x, Optional weight, Optional bias, Optional running_mean, Optional running_var,
                                            double momentum, double eps, bool relu) {
    return run_forward(TRAIN, x, weight, bias, running_mean, running_var, true, momentum, eps, relu);
}

std::tuple<Tensor, Tensor> batch_norm_eval(Tensor x, Optional weight, Optional bias, Tensor mean, Tensor var, double eps, bool relu) {
    return run_forward(EVAL, x, weight, bias, mean, var, false, 0, eps, relu);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor dy, Tensor x, Optional weight, Optional bias, Tensor stats, bool training,
                                                       double eps, bool relu, bool need_dx, bool need_dweight, bool need_dbias) {
    Format format = checked_input(BACKWARD, x);
    checked_parameters(BACKWARD, x, {{"weight", weight}, {"bias", bias}});
    checked(BACKWARD, "stats", stats, statistics_type(x), {3, x.size(1)});
    if (!dy.defined() || !dy.is_cpu() || dy.layout() != torch::headeronly::Layout::Strided || dy.scalar_type() != x.scalar_type() ||
        !std::ranges::equal(dy.sizes(), x.sizes()))
        fail(BACKWARD, ": dy must be a strided cpu tensor of shape ", shape_text(x), " and dtype ", toString(x.scalar_type()), " like x");
    with_type(BACKWARD, x.scalar_type(), [](auto) {});
    auto like = [&](const Optional& t) { return empty(t ? *t : x, {x.size(1)}); };
    Tensor dx = need_dx ? empty(x, format) : Tensor();
    Optional dweight, dbias;
    if (need_dweight) dweight = like(weight);
    if (need_dbias) dbias = like(bias);
    Arguments args = {PerChannel(weight), PerChannel(bias), {}, {}, 0, eps};
    if (x.size(1) > 0) {
        Tensor d = in_format(dy, format), xs = in_format(x, format), s = dense(stats);
        with_channels(BACKWARD, x, format, relu, [&](auto type, auto k, auto with_relu) {
            using T = decltype(type);
            backward<with_relu.value>(k, args, training, static_cast<const T*>(d.data_ptr()), static_cast<const T*>(xs.data_ptr()),
                                      Statistics<compute_t<T>>(s.data_ptr(), x.size(1)), need_dx ? static_cast<T*>(dx.data_ptr()) : nullptr,
                                      PerChannel(dweight), PerChannel(dbias));
        });
    }
    return {dx, dweight.value_or(Tensor()), dbias.value_or(Tensor())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("batch_norm_train", TORCH_BOX(&batch_norm_train));
    m.impl("batch_norm_eval", TORCH_BOX(&batch_norm_eval));
    m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

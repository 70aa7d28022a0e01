// The optimizers' updates: adam, sgd, rmsprop on all parameters in one parallel region, and the norm and scaling of all gradients.
//
// adam moves 28 bytes a parameter for some 15 flops: memory decides, so every array is read once and written once, and undoing the loss
// scale, clipping and zeroing the gradient happen on the way. A rule is a function of vectors: (p, g, three kept numbers) -> the same, new.
// Everything is checked before anything is changed.
#include "math.h"
#include "multi_tensor.h"
#include "philox.h"

namespace {

template <class V> inline V root(V v) {  // the compiler makes one instruction of it
    for (int i = 0; i < LANES<V>; i++) v[i] = std::sqrt(v[i]);
    return v;
}

enum Array { PARAM, GRAD, FIRST, SECOND, THIRD };

// What happens to a gradient before and after the rule has seen it.
struct Gradient {
    double factor;
    bool zero;
    Gradient(const char* op, const std::optional<Tensor>& factor, bool maximize, bool zero)
        : factor(number_of(op, "factor", factor, 1) * (maximize ? -1 : 1)), zero(zero) {}
};

// How a kept number is written: rounded to the nearest, unless by `Chance` (philox.h).
struct Nearest {
    void at(int64_t) {}
};

// rule(p, g, a, b, c) for the vectors of numbers [begin, end) of an entry; a, b, c are those of KEPT arrays, and 0 beyond.
template <int KEPT, class T, class S, class Rule, class Rounding = Nearest>
void apply(const Entry& entry, int64_t begin, int64_t end, const Gradient& gradient, Rule rule, Rounding rounding = {}) {
    using C = compute_t<T>;
    using V = vec<C>;
    T *p = static_cast<T*>(entry.array[PARAM]), *g = static_cast<T*>(entry.array[GRAD]);
    S* kept[] = {static_cast<S*>(entry.array[FIRST]), static_cast<S*>(entry.array[SECOND]), static_cast<S*>(entry.array[THIRD])};
    const V factor = set(C(gradient.factor));
    auto step = [&](int64_t n, auto... lanes) INLINE {
        V value = load(p + n, lanes...), slope = load(g + n, lanes...) * factor, state[3] = {};
#pragma GCC unroll 3
        for (int k = 0; k < KEPT; k++) state[k] = load(kept[k] + n, lanes...);
        rule(value, slope, state[0], state[1], state[2]);
        store(p + n, value, lanes...);
        rounding.at(n);
#pragma GCC unroll 3
        for (int k = 0; k < KEPT; k++)
            if constexpr (std::is_same_v<Rounding, Nearest>) store(kept[k] + n, state[k], lanes...);
            else store_raw(kept[k] + n, rounding.narrow(state[k], n, k > 0), lanes...);
        if (gradient.zero) store(g + n, V{}, lanes...);
    };
    for (; begin + VL<C> <= end; begin += VL<C>) step(begin);
    if (begin < end) step(begin, int(end - begin));
}

// The step counts, each one more. Written last, so that nothing has happened where a check fails.
struct Steps {
    const Tensors& tensors;
    std::vector<double> next;
    Steps(const char* op, const Tensors& tensors, size_t count) : tensors(tensors) {
        if (tensors.size() != count) fail(op, ": steps has ", tensors.size(), " tensors, needs ", count, " like params");
        for (const Tensor& t : tensors) next.push_back(number_of(op, "steps", t, 0) + 1);
    }
    void write() const {
        for (size_t i = 0; i < tensors.size(); i++)
            if (tensors[i].scalar_type() == ScalarType::Double) *static_cast<double*>(tensors[i].data_ptr()) = next[i];
            else *static_cast<float*>(tensors[i].data_ptr()) = float(next[i]);
    }
};

bool is_set(const char* op, const std::optional<Tensor>& found_inf) { return number_of(op, "found_inf", found_inf, 0) != 0; }

// ---- the rules -----------------------------------------------------------------------------------------------------------------

struct Adam {
    double lr, beta1, beta2, eps, decay;
    bool decoupled;
    // For numbers of type C at step t.
    template <bool AMSGRAD, class C> auto rule(double t) const {
        const C keep = C(decoupled ? 1 - lr * decay : 1), pull = C(decoupled ? 0 : decay), part1 = C(1 - beta1), b2 = C(beta2), part2 = C(1 - beta2);
        const C rate = C(lr / (1 - std::pow(beta1, t))), root_bias = C(1 / std::sqrt(1 - std::pow(beta2, t))), e = C(eps);
        return [=](auto& p, auto& g, auto& m, auto& v, auto& largest) INLINE {
            g += p * pull, p *= keep;
            m += (g - m) * part1;
            v = v * b2 + g * g * part2;
            if (AMSGRAD) largest = max(largest, v);
            p -= m * rate / (root(AMSGRAD ? largest : v) * root_bias + e);
        };
    }
};

void adam_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs, Tensors steps,
           std::optional<Tensor> factor, std::optional<Tensor> found_inf, double lr, double beta1, double beta2, double eps,
           double weight_decay, bool decoupled, bool maximize, bool zero_grads, bool by_chance) {
    constexpr const char* OP = "adam_";
    Entries entries(OP, {{"params", params}, {"grads", grads, false, zero_grads}, {"exp_avgs", exp_avgs, true}, {"exp_avg_sqs", exp_avg_sqs, true},
                         {"max_exp_avg_sqs", max_exp_avg_sqs, true}}, by_chance);
    Steps counts(OP, steps, params.size());
    Gradient gradient(OP, factor, maximize, zero_grads);
    if (is_set(OP, found_inf)) return;
    const Adam adam{lr, beta1, beta2, eps, weight_decay, decoupled};
    each_part(entries.all, [&](size_t i, int64_t begin, int64_t end) {
        const Entry& entry = entries.all[i];
        auto run = [&](auto type, auto kept, auto... rounding) {
            using T = decltype(type);
            using S = decltype(kept);
            using C = compute_t<T>;
            if (entry.array[THIRD]) apply<3, T, S>(entry, begin, end, gradient, adam.rule<true, C>(counts.next[i]), rounding...);
            else apply<2, T, S>(entry, begin, end, gradient, adam.rule<false, C>(counts.next[i]), rounding...);
        };
        if (!by_chance) return with_types(OP, entry, run);
        with_type(OP, entry.type, [&](auto type) {
            if constexpr (sizeof(type) < 8) run(type, bf16{}, Chance(uint64_t(counts.next[i]), i));
        });
    });
    entries.write_back(), counts.write();
}

void sgd_(Tensors params, Tensors grads, Tensors buffers, std::optional<Tensor> factor, std::optional<Tensor> found_inf, double lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool first, bool zero_grads) {
    constexpr const char* OP = "sgd_";
    Entries entries(OP, {{"params", params}, {"grads", grads, false, zero_grads}, {"momentum_buffers", buffers, true}});
    Gradient gradient(OP, factor, maximize, zero_grads);
    if (is_set(OP, found_inf)) return;
    each_part(entries.all, [&](size_t i, int64_t begin, int64_t end) {
        const Entry& entry = entries.all[i];
        with_types(OP, entry, [&](auto type, auto kept) {
            using C = compute_t<decltype(type)>;
            const C rate = C(lr), pull = C(weight_decay), mu = C(momentum), part = C(1 - dampening);
            auto plain = [=](auto& p, auto& g, auto&, auto&, auto&) INLINE { p -= (g + p * pull) * rate; };
            auto with_momentum = [=](auto& p, auto& g, auto& b, auto&, auto&) INLINE {
                g += p * pull;
                b = first ? g : b * mu + g * part;  // at first b may hold anything
                p -= (nesterov ? g + b * mu : b) * rate;
            };
            if (entry.array[FIRST]) apply<1, decltype(type), decltype(kept)>(entry, begin, end, gradient, with_momentum);
            else apply<0, decltype(type), decltype(kept)>(entry, begin, end, gradient, plain);
        });
    });
    entries.write_back();
}

struct RMSprop {
    double lr, alpha, eps, decay, momentum;
    template <bool CENTERED, bool MOMENTUM, class C> auto rule() const {
        const C rate = C(lr), keep = C(alpha), part = C(1 - alpha), e = C(eps), pull = C(decay), mu = C(momentum);
        return [=](auto& p, auto& g, auto& v, auto& second, auto& third) INLINE {
            auto &mean = second, &b = CENTERED ? third : second;
            g += p * pull;
            v = v * keep + g * g * part;
            if (CENTERED) mean += (g - mean) * part;
            auto d = g / (root(CENTERED ? v - mean * mean : v) + e);
            if (MOMENTUM) d = b = b * mu + d;
            p -= d * rate;
        };
    }
};

void rmsprop_(Tensors params, Tensors grads, Tensors square_avgs, Tensors grad_avgs, Tensors buffers, Tensors steps,
              std::optional<Tensor> factor, std::optional<Tensor> found_inf, double lr, double alpha, double eps, double weight_decay,
              double momentum, bool maximize, bool zero_grads) {
    constexpr const char* OP = "rmsprop_";
    const bool centered = !grad_avgs.empty();
    Entries entries(OP, {{"params", params}, {"grads", grads, false, zero_grads}, {"square_avgs", square_avgs, true},
                         {centered ? "grad_avgs" : "momentum_buffers", centered ? grad_avgs : buffers, true},
                         {"momentum_buffers", centered ? buffers : grad_avgs, true}});
    Steps counts(OP, steps, params.size());
    Gradient gradient(OP, factor, maximize, zero_grads);
    if (is_set(OP, found_inf)) return;
    const RMSprop rmsprop{lr, alpha, eps, weight_decay, momentum};
    each_part(entries.all, [&](size_t i, int64_t begin, int64_t end) {
        const Entry& entry = entries.all[i];
        with_types(OP, entry, [&](auto type, auto kept) {
            using T = decltype(type);
            using S = decltype(kept);
            using C = compute_t<T>;
            if (centered && !buffers.empty()) apply<3, T, S>(entry, begin, end, gradient, rmsprop.rule<true, true, C>());
            else if (centered) apply<2, T, S>(entry, begin, end, gradient, rmsprop.rule<true, false, C>());
            else if (!buffers.empty()) apply<2, T, S>(entry, begin, end, gradient, rmsprop.rule<false, true, C>());
            else apply<1, T, S>(entry, begin, end, gradient, rmsprop.rule<false, false, C>());
        });
    });
    entries.write_back(), counts.write();
}

// ---- all gradients at once -------------------------------------------------------------------------------------------------------

template <int P> double joined(double a, double b) { return P ? a + b : b > a || b != b ? b : a; }  // a NaN stays

// Part of the norm of type P (0: inf), of n numbers: the largest size, or the sum of the sizes' P-th powers.
template <int P, class T> double part_of_norm(const T* p, int64_t n) {
    using V = vec<compute_t<T>>;
    constexpr int L = VL<compute_t<T>>, WIDE = 4;
    V sums[WIDE] = {};
    auto add = [](V& sum, V x) INLINE {
        V size = x < V{} ? -x : x;
        if constexpr (P == 0) sum = size > sum || size != size ? size : sum;
        else sum += P == 1 ? size : x * x;
    };
    for (; n >= WIDE * L; n -= WIDE * L, p += WIDE * L)
#pragma GCC unroll 4
        for (int u = 0; u < WIDE; u++) add(sums[u], load(p + u * L));
    for (; n > 0; n -= L, p += L) add(sums[0], load(p, int(std::min<int64_t>(L, n))));
    double total = 0;
    for (const V& sum : sums)
        for (int lane = 0; lane < L; lane++) total = joined<P>(total, sum[lane]);
    return total;
}

// Of all entries: parts over units, joined in order.
template <int P> double norm(const std::vector<Entry>& entries) {
    const std::vector<int64_t> first = first_units(entries);
    std::vector<double> parts(first.back());
    each_part(entries, [&](size_t i, int64_t begin, int64_t end) {
        with_type("total_norm", entries[i].type, [&](auto type) {
            auto p = static_cast<const decltype(type)*>(entries[i].array[PARAM]);
            for (; begin < end; begin += UNIT) parts[first[i] + begin / UNIT] = part_of_norm<P>(p + begin, std::min(UNIT, end - begin));
        });
    });
    double total = 0;
    for (double part : parts) total = joined<P>(total, part);
    return P == 2 ? std::sqrt(total) : total;
}

Tensor total_norm(Tensors tensors, double norm_type) {
    constexpr const char* OP = "total_norm";
    if (norm_type != 1 && norm_type != 2 && norm_type != std::numeric_limits<double>::infinity())
        fail(OP, ": norm_type is ", norm_type, ", needs 1, 2 or inf");
    Entries entries(OP, {{"tensors", tensors}});
    bool is_double = std::ranges::any_of(entries.all, [](const Entry& entry) { return entry.type == ScalarType::Double; });
    Tensor result = empty(is_double ? ScalarType::Double : ScalarType::Float, {});
    double total = norm_type == 1 ? norm<1>(entries.all) : norm_type == 2 ? norm<2>(entries.all) : norm<0>(entries.all);
    if (is_double) *static_cast<double*>(result.data_ptr()) = total;
    else *static_cast<float*>(result.data_ptr()) = float(total);
    return result;
}

void scale_(Tensors tensors, Tensor factor) {
    constexpr const char* OP = "scale_";
    Entries entries(OP, {{"tensors", tensors}});
    double by = number_of(OP, "factor", factor, 1);
    each_part(entries.all, [&](size_t i, int64_t begin, int64_t end) {
        with_type(OP, entries.all[i].type, [&](auto type) {
            using T = decltype(type);
            auto p = static_cast<T*>(entries.all[i].array[PARAM]);
            constexpr int L = VL<compute_t<T>>;
            const auto v = set(compute_t<T>(by));
            for (int64_t n = begin; n < end; n += L) {
                int lanes = int(std::min<int64_t>(L, end - n));
                store(p + n, load(p + n, lanes) * v, lanes);
            }
        });
    });
    entries.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("adam_", TORCH_BOX(&adam_));
    m.impl("sgd_", TORCH_BOX(&sgd_));
    m.impl("rmsprop_", TORCH_BOX(&rmsprop_));
    m.impl("total_norm", TORCH_BOX(&total_norm));
    m.impl("scale_", TORCH_BOX(&scale_));
}

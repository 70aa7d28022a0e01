// scaled_dot_product_attention: the ops, with every argument checked. attention.h says how the work is cut.
#include "attention_backward.h"
#include "attention_decode.h"
#include "heads.h"

namespace {

constexpr const char* FORWARD = "scaled_dot_product_attention_forward";
constexpr const char* BACKWARD = "scaled_dot_product_attention_backward";
using Optional = std::optional<Tensor>;

struct Call {  // the arguments of either op
    const char* op;
    Tensor query, key, value;
    Optional mask, slopes, cu_seqlens_q, cu_seqlens_k, seed;
    Options o;
    std::vector<Sequence> sequences;
    int64_t B, H, G, L, S, D, E;

    void check() {
        for (auto [name, t] : {std::pair{"query", query}, {"key", key}, {"value", value}}) ranked(op, name, t, 4);
        B = query.size(0), H = query.size(1), L = query.size(2), D = query.size(3);
        G = key.size(1), S = key.size(2), E = value.size(3);
        checked(op, "query", query, query.scalar_type(), {B, H, L, D});
        checked(op, "key", key, query.scalar_type(), {B, G, S, D});
        checked(op, "value", value, query.scalar_type(), {B, G, S, E});
        if (G ? H % G : H) fail(op, ": query has ", H, " heads, needs a multiple of the ", G, " of key");
        if (std::max(D, E) > WIDEST) fail(op, ": heads have ", D, " and ", E, " numbers, needs at most ", WIDEST);
        if (o.function.code < 0 || o.function.code >= SCORE_FUNCTIONS)
            fail(op, ": score_function is ", o.function.code, ", needs a number below ", int(SCORE_FUNCTIONS),
                 "; csrc/cpu/score_functions.h has no other");
        constexpr int64_t FAR = int64_t(1) << 40;
        o.left = std::min(o.left, FAR), o.right = std::min(o.right, FAR), o.H = H, o.S = S;
        if (seed) o.dropout.emplace(checked_seed(op, *seed, o.p), o.p);
        if (mask) check_mask();
        if (slopes) {
            ranked(op, "slopes", *slopes, 2);
            checked(op, "slopes", *slopes, statistics_type(query), {slopes->size(0) == 1 ? 1 : B, H});
            slopes = dense(*slopes);
            o.slopes = slopes->data_ptr(), o.slopes_batch = slopes->size(0) == 1 ? 0 : H;
        }
        check_starts();
        query = with_rows(query), key = with_rows(key), value = with_rows(value);
    }

    void check_mask() {
        ScalarType dtype = mask->scalar_type();
        bool half = query.element_size() == 2;
        o.mask.kind = dtype == ScalarType::Bool ? MaskKind::BOOLEAN : dtype == query.scalar_type() ? MaskKind::LIKE_QUERY : MaskKind::FLOAT;
        if (o.mask.kind == MaskKind::FLOAT && !(half && dtype == ScalarType::Float))
            fail(op, ": mask has dtype ", toString(dtype), ", needs Bool, ", toString(query.scalar_type()), " like query, or Float");
        ranked(op, "mask", *mask, 4);
        int64_t full[4] = {B, H, L, S};
        for (int i = 0; i < 4; i++) {
            o.mask.sizes[i] = mask->size(i);
            if (mask->size(i) != 1) o.mask.sizes[i] = full[i];
            o.mask.strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
        }
        checked(op, "mask", *mask, dtype, o.mask.sizes, 4);
        o.mask.p = mask->data_ptr();
    }

    void check_starts() {
        if (cu_seqlens_q.has_value() != cu_seqlens_k.has_value()) fail(op, ": cu_seqlens_q and cu_seqlens_k need each other");
        if (!cu_seqlens_q) {
            for (int64_t b = 0; b < B; b++) sequences.push_back({b, 0, L, 0, S});
            return;
        }
        if (B != 1 || mask) fail(op, ": packed sequences have ", B, " batches", mask ? " and a mask" : "", ", needs 1 and none");
        int64_t count = ranked(op, "cu_seqlens_q", *cu_seqlens_q, 1).size(0);
        auto starts = [&](const char* name, const Tensor& t, int64_t total) {
            checked(op, name, t, ScalarType::Long, {count});
            Tensor lying = dense(t);
            auto p = static_cast<const int64_t*>(lying.data_ptr());
            std::string needs = std::string(name) + " needs numbers from 0 to " + std::to_string(total) + " that do not decrease, got ";
            if (!count) fail(op, ": ", needs, "none");
            for (int64_t i = 1; i < count; i++)
                if (p[i - 1] > p[i]) fail(op, ": ", needs, p[i], " after ", p[i - 1]);
            if (p[0] != 0 || p[count - 1] != total) fail(op, ": ", needs, "numbers from ", p[0], " to ", p[count - 1]);
            return std::vector<int64_t>(p, p + count);
        };
        auto l = starts("cu_seqlens_q", *cu_seqlens_q, L), s = starts("cu_seqlens_k", *cu_seqlens_k, S);
        for (int64_t i = 0; i + 1 < count; i++) sequences.push_back({0, l[i], l[i + 1] - l[i], s[i], s[i + 1] - s[i]});
    }

    template <class T> Attention<T> arguments(const Tensor& y, const Tensor& lse) const {
        return {o, sequences, H, G, D, E, Heads<T>(query), Heads<T>(key), Heads<T>(value), Heads<T>(y),
                static_cast<compute_t<T>*>(lse.data_ptr()), H * L, L};
    }
};

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, Optional mask, Optional slopes, Optional cu_seqlens_q,
                                   Optional cu_seqlens_k, Optional seed, double p, double scale, int64_t score_function,
                                   double parameter, int64_t left, int64_t right, bool lower_right) {
    Options o{p, scale, {score_function, parameter}, left, right, lower_right};
    Call call{FORWARD, query, key, value, mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, o};
    call.check();
    Tensor y = empty_heads(query, call.E), lse = empty(statistics_type(query), {call.B, call.H, call.L});
    with_type(FORWARD, query.scalar_type(), [&](auto type) {
        auto few = call.arguments<decltype(type)>(y, lse), many = few;
        std::erase_if(few.sequences, [&](const Sequence& q) { return !is_few(few, q); });
        std::erase_if(many.sequences, [&](const Sequence& q) { return is_few(many, q); });
        Decoder(few).run();
        attention_forward(many);
    });
    return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, Tensor query, Tensor key, Tensor value, Tensor y, Tensor lse, Optional mask, Optional slopes, Optional cu_seqlens_q,
    Optional cu_seqlens_k, Optional seed, double p, double scale, int64_t score_function, double parameter, int64_t left, int64_t right,
    bool lower_right, bool need_dquery, bool need_dkey, bool need_dvalue, bool need_dmask) {
    Options o{p, scale, {score_function, parameter}, left, right, lower_right};
    Call call{BACKWARD, query, key, value, mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, o};
    call.check();
    checked(BACKWARD, "dy", dy, query.scalar_type(), {call.B, call.H, call.L, call.E});
    checked(BACKWARD, "y", y, query.scalar_type(), {call.B, call.H, call.L, call.E});
    checked(BACKWARD, "lse", lse, statistics_type(query), {call.B, call.H, call.L});
    need_dmask = need_dmask && mask && mask->scalar_type() != ScalarType::Bool;
    Tensor dys = with_rows(dy), ys = with_rows(y), sums = dense(lse), dmask;
    Tensor dquery = need_dquery ? empty_heads(query, call.D) : Tensor(), dkey = need_dkey ? empty_heads(key, call.D) : Tensor();
    Tensor dvalue = need_dvalue ? empty_heads(value, call.E) : Tensor();
    if (need_dmask) dmask = empty(*mask);
    with_type(BACKWARD, query.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        auto a = call.arguments<T>(ys, sums);
        Gradients<T> d{Heads<T>(dys), Heads<T>(dquery), Heads<T>(dkey), Heads<T>(dvalue)};
        int64_t heads = int64_t(call.sequences.size()) * call.G;
        d.parts = parts_of(heads, call.B * call.H * call.L, call.S, call.D), d.B = call.B, d.L = call.L;
        Tensor shares = d.parts > 1 ? empty(statistics_type(query), {d.parts, call.B * call.H * call.L * call.D}) : Tensor();
        d.shares = data<C>(shares);
        if (need_dquery || need_dkey || need_dvalue) attention_backward(a, d);
        if (!need_dmask || !dmask.numel()) return;
        if (call.o.mask.kind == MaskKind::LIKE_QUERY) mask_gradient(a, d.dy, data<T>(dmask));
        else if constexpr (sizeof(T) == 2) mask_gradient(a, d.dy, data<float>(dmask));
    });
    return {dquery, dkey, dvalue, dmask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl(FORWARD, TORCH_BOX(&forward));
    m.impl(BACKWARD, TORCH_BOX(&backward));
}

// kv_cache_append_: rows of keys and values copied to their places behind those of earlier tokens. Nothing is written unless all of it fits.
#include "heads.h"
#include "rows.h"

namespace {

constexpr const char* APPEND = "kv_cache_append_";

// Numbers are copied, not computed with: their size is all that counts. `from` and `cache` are [B, G, rows, width].
void append(const Tensor& cache, const Tensor& from, const std::vector<int64_t>& starts) {
    int64_t B = from.size(0), G = from.size(1), T = from.size(2), bytes = from.size(3) * from.element_size(), size = from.element_size();
    auto to = static_cast<char*>(cache.mutable_data_ptr());
    auto source = static_cast<const char*>(from.data_ptr());
    auto offset = [size](const Tensor& t, int64_t b, int64_t g, int64_t row) {
        return (b * t.stride(0) + g * t.stride(1) + row * t.stride(2)) * size;
    };
    each_row(B * G * T, from.size(3), [&](int64_t m) {
        int64_t b = m / T / G, g = m / T % G, t = m % T;
        memmove(to + offset(cache, b, g, starts[b] + t), source + offset(from, b, g, t), bytes);
    });
}

void kv_cache_append(Tensor key_cache, Tensor value_cache, Tensor key, Tensor value, int64_t position, std::optional<Tensor> positions) {
    for (auto [name, t] : {std::pair{"key_cache", key_cache}, {"value_cache", value_cache}, {"key", key}, {"value", value}})
        ranked(APPEND, name, t, 4);
    ScalarType dtype = key_cache.scalar_type();
    int64_t B = key_cache.size(0), G = key_cache.size(1), C = key_cache.size(2), T = key.size(2), D = key_cache.size(3), E = value.size(3);
    with_type(APPEND, dtype, [](auto) {});
    checked(APPEND, "key_cache", key_cache, dtype, {B, G, C, D});
    checked(APPEND, "value_cache", value_cache, dtype, {B, G, C, E});
    checked(APPEND, "key", key, dtype, {B, G, T, D});
    checked(APPEND, "value", value, dtype, {B, G, T, E});
    for (auto [name, t] : {std::pair{"key_cache", key_cache}, {"value_cache", value_cache}})
        for (int i = 0; i < 4; i++)
            if (t.size(i) > 1 && (t.stride(i) == 0 || (i == 3 && t.stride(i) != 1)))
                fail(APPEND, ": ", name, " has a stride of ", t.stride(i), " in dimension ", i, ", needs ", i == 3 ? "1" : "another");
    std::vector<int64_t> starts(B, position);
    if (positions) {
        Tensor lying = dense(checked(APPEND, "positions", *positions, ScalarType::Long, {B}));
        std::copy_n(static_cast<const int64_t*>(lying.data_ptr()), B, starts.begin());
    }
    for (int64_t p : starts)
        if (p < 0 || p > C - T) fail("position ", p, " is out of range: key has ", T, " tokens, and key_cache has ", C, " places");
    append(key_cache, with_rows(key), starts);
    append(value_cache, with_rows(value), starts);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) { m.impl(APPEND, TORCH_BOX(&kv_cache_append)); }

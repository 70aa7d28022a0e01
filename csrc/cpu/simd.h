// Vectors that read like numbers. The only file in which an instruction set is named.
//
//   vec<float> v = load(x + i);           VL<float> numbers at once (any storage type in, compute type out)
//   store(y + i, v * a + b, n);           the first n lanes: every tail is a masked load or store, never a second loop
//
// A vec is the compiler's own vector type, so + - * / < ?: work lane by lane and a * b + c becomes one fused multiply-add.
// bf16 and f16 are storage only: load widens them to float, store rounds back to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) || defined(EMULATE_TILES)  // a row of a tile is one vector
constexpr int VECTOR_BYTES = 64, MR = 14, NV = 2, DOT_ROWS = 4;  // register tile: 28 accumulators + 2 of B + 1 of A, of 32 registers
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, MR = 6, NV = 2, DOT_ROWS = 2;   // 12 + 2 + 1, of 16
#else
constexpr int VECTOR_BYTES = 16, MR = 6, NV = 2, DOT_ROWS = 2;
#endif

struct bf16 { uint16_t bits; };  // the upper half of a float
struct f16 { uint16_t bits; };   // IEEE binary16

template <class T> struct compute { using type = float; };
template <> struct compute<double> { using type = double; };
template <class T> using compute_t = typename compute<T>::type;  // what arithmetic on a stored T is done in

template <class T> struct vector_of { typedef T type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using vec = typename vector_of<T>::type;
template <class T> constexpr int VL = VECTOR_BYTES / sizeof(T);
template <class T> using ints = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;  // integers as wide as T

typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2)));  // VL<float> stored half-precision numbers

template <class To, class From> inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
}
template <class T> inline vec<T> set(T x) { return x - vec<T>{}; }  // x - 0 is x, so this is one broadcast
template <class V> inline V max(V a, V b) { return a > b ? a : b; }
template <class V> inline V min(V a, V b) { return a < b ? a : b; }
template <class V> inline V abs(V a) { return a < 0 ? -a : a; }

// 1 / x to the last bit or so, for x that has a normal reciprocal: an estimate of 14 bits and a step of Newton's, where division is slower.
template <class T> inline vec<T> reciprocal(vec<T> x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        vec<T> r = bits_as<vec<T>>(_mm512_maskz_rcp14_ps(0xffff, bits_as<__m512>(x)));
        return r + r * (1 - x * r);
    }
#endif
    return 1 / x;
}

#define INLINE __attribute__((always_inline))  // for loops whose bodies are functions: sums stay in registers

template <class T> inline vec<ints<T>> lane_numbers() {
    vec<ints<T>> lane;
    for (int i = 0; i < VL<T>; i++) lane[i] = i;
    return lane;
}
// The first `lanes` lanes of v, zero in the others.
template <class V> inline V keep(V v, int lanes) {
    using T = std::remove_reference_t<decltype(V{}[0])>;
    return lanes >= VL<T> ? v : lane_numbers<T>() < ints<T>(lanes) ? v : V{};
}

// Combine the lanes of a vector with f, in halves: lane i with lane i + n/2, and so on.
template <int W, class V, class F, int... L> inline V fold(V v, const F& f, std::integer_sequence<int, L...> lanes) {
    if constexpr (W == 0) return v;
    else return fold<W / 2>(f(v, __builtin_shufflevector(v, v, ((L + W) % int(sizeof...(L)))...)), f, lanes);
}
template <class V> constexpr int LANES = sizeof(V) / sizeof(V{}[0]);
template <class V, class F> inline auto fold(V v, const F& f) {
    return fold<LANES<V> / 2>(v, f, std::make_integer_sequence<int, LANES<V>>{})[0];
}
template <class V> inline auto sum(V v) { return fold(v, [](V a, V b) { return a + b; }); }
template <class V> inline auto largest(V v) { return fold(v, [](V a, V b) { return max(a, b); }); }

// ---- raw loads and stores of V, whole or of its first n lanes ------------------------------------------------------------------

template <class V, class T> inline V load_raw(const T* p) {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
}
template <class V, class T> inline V load_raw(const T* p, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return bits_as<V>(_mm512_maskz_loadu_epi32((1u << n) - 1, p));
    if constexpr (sizeof(V) == 64 && sizeof(T) == 8) return bits_as<V>(_mm512_maskz_loadu_epi64((1u << n) - 1, p));
    if constexpr (sizeof(V) == 32 && sizeof(T) == 2) return bits_as<V>(_mm256_maskz_loadu_epi16((1u << n) - 1, p));
    if constexpr (sizeof(V) == 64 && sizeof(T) == 2) return bits_as<V>(_mm512_maskz_loadu_epi16((1ull << n) - 1, p));
    if constexpr (sizeof(V) == 16 && sizeof(T) == 1) return bits_as<V>(_mm_maskz_loadu_epi8((1u << n) - 1, p));
#endif
    V v{};
    memcpy(&v, p, n * sizeof(T));
    return v;
}
template <class V, class T> inline void store_raw(T* p, V v) { memcpy(p, &v, sizeof(v)); }
template <class V, class T> inline void store_raw(T* p, V v, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return _mm512_mask_storeu_epi32(p, (1u << n) - 1, bits_as<__m512i>(v));
    if constexpr (sizeof(V) == 64 && sizeof(T) == 8) return _mm512_mask_storeu_epi64(p, (1u << n) - 1, bits_as<__m512i>(v));
    if constexpr (sizeof(V) == 32 && sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, (1u << n) - 1, bits_as<__m256i>(v));
    if constexpr (sizeof(V) == 16 && sizeof(T) == 1) return _mm_mask_storeu_epi8(p, (1u << n) - 1, bits_as<__m128i>(v));
#endif
    memcpy(p, &v, n * sizeof(T));
}

// A store past the caches, and what makes those before it visible to other threads. p is a multiple of the size of V.
template <class V, class T> inline void stream_raw(T* p, V v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_as<__m512i>(v));
#endif
#if defined(__AVX__)
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_as<__m256i>(v));
#endif
#if defined(__SSE2__)
    if constexpr (sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits_as<__m128i>(v));
#endif
    store_raw(p, v);
}
inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// The 64-bit products of the lower halves of 64-bit lanes.
inline vec<uint64_t> multiply_low(vec<uint64_t> a, vec<uint64_t> b) {
#if defined(__AVX512F__)
    return bits_as<vec<uint64_t>>(_mm512_mul_epu32(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__) && !defined(EMULATE_TILES)
    return bits_as<vec<uint64_t>>(_mm256_mul_epu32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#elif defined(__SSE2__) && !defined(EMULATE_TILES)
    return bits_as<vec<uint64_t>>(_mm_mul_epu32(bits_as<__m128i>(a), bits_as<__m128i>(b)));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// ---- half precision ------------------------------------------------------------------------------------------------------------

// 16 bits to 32 and back, and 8 to 32: the compiler's own conversion takes six instructions for each of these.
typedef uint8_t bytes __attribute__((vector_size(VECTOR_BYTES / 4)));  // VL<float> of them
#if defined(__AVX512F__)
inline vec<uint32_t> lengthen(halves h) { return bits_as<vec<uint32_t>>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(h))); }
inline vec<uint32_t> lengthen(bytes b) { return bits_as<vec<uint32_t>>(_mm512_maskz_cvtepu8_epi32(0xffff, bits_as<__m128i>(b))); }
inline halves shorten(vec<uint32_t> u) { return bits_as<halves>(_mm512_maskz_cvtepi32_epi16(0xffff, bits_as<__m512i>(u))); }
#else
inline vec<uint32_t> lengthen(halves h) { return __builtin_convertvector(h, vec<uint32_t>); }
inline vec<uint32_t> lengthen(bytes b) { return lengthen(__builtin_convertvector(b, halves)); }
inline halves shorten(vec<uint32_t> u) { return __builtin_convertvector(u, halves); }
#endif
inline vec<float> widen(halves h, bf16) { return bits_as<vec<float>>(lengthen(h) << 16); }
inline halves narrow(vec<float> v, bf16, bool normal = false) {  // round to nearest even; a NaN stays one
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
    constexpr int SUBNORMAL = 0x20;  // which the instruction takes for 0
    if (normal || !_mm512_fpclass_ps_mask(bits_as<__m512>(v), SUBNORMAL)) return bits_as<halves>(_mm512_cvtneps_pbh(bits_as<__m512>(v)));
#endif
    vec<uint32_t> u = bits_as<vec<uint32_t>>(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return shorten(v != v ? vec<uint32_t>{} + 0x7fc0 : rounded);
}
inline vec<float> widen(halves h, f16) {
#if defined(__AVX512F__)
    return bits_as<vec<float>>(_mm512_cvtph_ps(bits_as<__m256i>(h)));
#elif defined(__F16C__)
    return bits_as<vec<float>>(_mm256_cvtph_ps(bits_as<__m128i>(h)));
#else
    vec<float> v;
    for (int i = 0; i < VL<float>; i++) v[i] = float(bits_as<_Float16>(uint16_t(h[i])));
    return v;
#endif
}
inline halves narrow(vec<float> v, f16) {
#if defined(__AVX512F__)
    return bits_as<halves>(_mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    return bits_as<halves>(_mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    halves h;
    for (int i = 0; i < VL<float>; i++) h[i] = bits_as<uint16_t>(_Float16(v[i]));
    return h;
#endif
}

// ---- load and store: any storage type, compute type in the register -------------------------------------------------------------

template <class T> inline vec<compute_t<T>> load(const T* p) {
    if constexpr (sizeof(T) == 2) return widen(load_raw<halves>(p), T{});
    else return load_raw<vec<T>>(p);
}
template <class T> inline vec<compute_t<T>> load(const T* p, int n) {
    if (n >= VL<compute_t<T>>) return load(p);
    if constexpr (sizeof(T) == 2) return widen(load_raw<halves>(p, n), T{});
    else return load_raw<vec<T>>(p, n);
}
template <class T> inline void store(T* p, vec<compute_t<T>> v) {
    if constexpr (sizeof(T) == 2) store_raw(p, narrow(v, T{}));
    else store_raw(p, v);
}
template <class T> inline void store(T* p, vec<compute_t<T>> v, int n) {
    if (n >= VL<compute_t<T>>) return store(p, v);
    if constexpr (sizeof(T) == 2) store_raw(p, narrow(v, T{}), n);
    else store_raw(p, v, n);
}

// ---- transpose a VL x VL square of numbers held in VL registers ------------------------------------------------------------------
// log2(VL) passes; pass S swaps the off-diagonal S x S blocks of every 2S x 2S block.

template <int S, class V, int... L> inline void swap_blocks(V& a, V& b, std::integer_sequence<int, L...>) {
    constexpr int n = sizeof...(L);
    V low = __builtin_shufflevector(a, b, ((L & S) ? n + L - S : L)...);
    b = __builtin_shufflevector(a, b, ((L & S) ? n + L : L + S)...);
    a = low;
}
template <int S = 1, class V, int n> inline void transpose(V (&row)[n]) {
    if constexpr (S < n) {
#pragma GCC unroll 32
        for (int i = 0; i < n; i++)
            if (!(i & S)) swap_blocks<S>(row[i], row[i | S], std::make_integer_sequence<int, n>{});
        transpose<2 * S>(row);
    }
}

// ---- products of bf16 pairs: a 32-bit lane holds k (low half) and k + 1 (high half) of one row ---------------------------------------

typedef vec<uint32_t> pairs;

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIR_DOT = true;
inline vec<float> dot_pairs(vec<float> acc, pairs a, pairs b) {
    return bits_as<vec<float>>(_mm512_dpbf16_ps(bits_as<__m512>(acc), bits_as<__m512bh>(a), bits_as<__m512bh>(b)));
}
#else
constexpr bool HAS_PAIR_DOT = false;
inline vec<float> dot_pairs(vec<float> acc, pairs a, pairs b) {
    return acc + bits_as<vec<float>>(a << 16) * bits_as<vec<float>>(b << 16) +
           bits_as<vec<float>>(a & 0xffff0000u) * bits_as<vec<float>>(b & 0xffff0000u);
}
#endif

// The tile registers of AMX: eight of 16 rows x 64 bytes. tile_dot: C[16][16] += A[16 rows][16 pairs] B[16 pairs][16 columns].
#if defined(__AMX_BF16__)
constexpr bool HAS_TILES = true;
struct TileSession {  // the tiles are configured while one of these lives
    TileSession() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~TileSession() { asm volatile("tilerelease"); }
};
template <int T> inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> inline void tile_load(const void* p, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
}
template <int T> inline void tile_store(void* p, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
}
template <int C, int A, int B> inline void tile_dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
#elif defined(EMULATE_TILES)  // the same in plain C++, for tests on a CPU without them
constexpr bool HAS_TILES = true;
struct TileSession {};
inline thread_local uint32_t tile[8][16][16];
template <int T> inline void tile_zero() { memset(tile[T], 0, sizeof(tile[T])); }
template <int T> inline void tile_load(const void* p, int64_t row_bytes) {
    for (int i = 0; i < 16; i++) memcpy(tile[T][i], static_cast<const char*>(p) + i * row_bytes, 64);
}
template <int T> inline void tile_store(void* p, int64_t row_bytes) {
    for (int i = 0; i < 16; i++) memcpy(static_cast<char*>(p) + i * row_bytes, tile[T][i], 64);
}
template <int C, int A, int B> inline void tile_dot() {
    for (int m = 0; m < 16; m++) {
        vec<float> sum = load_raw<vec<float>>(tile[C][m]);
        for (int k = 0; k < 16; k++) sum = dot_pairs(sum, pairs{} + tile[A][m][k], load_raw<pairs>(tile[B][k]));
        store_raw(tile[C][m], sum);
    }
}
#else
constexpr bool HAS_TILES = false;
struct TileSession {};
template <int> inline void tile_zero() {}
template <int> inline void tile_load(const void*, int64_t) {}
template <int> inline void tile_store(void*, int64_t) {}
template <int, int, int> inline void tile_dot() {}
#endif

// Probe loops for each instruction set and the choice among them at run time. The file is compiled for the plainest CPU of its
// architecture; only the functions marked PROBE_TARGET use more, and only a CPU that has the features gets to call them.
#include "cpu.h"
#include "roofline.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// What the compiler must believe: the value is used; the value is not known; memory is read and written behind its back.
#define KEEP(value) __asm__ volatile("" ::"m"(value))
#define HIDE(value) __asm__ volatile("" : "+m"(value))
#define FORGET_MEMORY() __asm__ volatile("" ::: "memory")

#if defined(__x86_64__)

#define PROBE_ISA baseline
#define PROBE_TARGET
#define PROBE_BYTES 16
#define PROBE_CHAINS 12
#define PROBE_STREAM(p, v) _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)(v))
#include "probes.h"

#define PROBE_ISA avx2
#define PROBE_TARGET __attribute__((target("avx2,fma")))
#define PROBE_BYTES 32
#define PROBE_CHAINS 12
#define PROBE_STREAM(p, v) _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)(v))
#include "probes.h"

#define PROBE_ISA avx512
#define PROBE_TARGET __attribute__((target("avx512f")))
#define PROBE_BYTES 64
#define PROBE_CHAINS 24
#define PROBE_STREAM(p, v) _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)(v))
#include "probes.h"

#else

#define PROBE_ISA baseline
#define PROBE_TARGET
#define PROBE_BYTES 16
#define PROBE_CHAINS 24
#define PROBE_STREAM(p, v) (*(p) = (v))
#include "probes.h"

#endif

namespace dlkernels::host {
namespace {

#if defined(__x86_64__)

// acc += a b over pairs of bfloat16, where the pairs of a are (1, -1) and b is 1: the sums stay zero.
constexpr std::uint16_t kOne = 0x3f80, kMinusOne = 0xbf80;
constexpr int kDotChains = 24;

__attribute__((target("avx512f,avx512bf16"))) void dot_bf16(std::int64_t repeats) {
    const __m512bh a = (__m512bh)_mm512_set1_epi32(kOne | kMinusOne << 16), b = (__m512bh)_mm512_set1_epi32(kOne | kOne << 16);
    __m512 acc[kDotChains];
    for (__m512& chain : acc) chain = _mm512_setzero_ps();
    for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
#pragma GCC unroll 32
        for (int chain = 0; chain < kDotChains; ++chain) acc[chain] = _mm512_dpbf16_ps(acc[chain], a, b);
    }
    __m512 sum = _mm512_setzero_ps();
    for (const __m512& chain : acc) sum = _mm512_add_ps(sum, chain);
    KEEP(sum);
}

// Tiles 0 to 5 accumulate the product of tile 6 (16 rows of 32 bfloat16) and tile 7 (16 rows of 16 pairs).
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
constexpr int kTileChains = 6;

__attribute__((target("amx-tile,amx-bf16,avx512f"))) void tile_bf16(std::int64_t repeats) {
    static constexpr TileConfig config;
    alignas(64) std::uint16_t a[16 * 32], b[16 * 32];
    for (int i = 0; i < 16 * 32; ++i) {
        a[i] = i % 2 ? kMinusOne : kOne;
        b[i] = kOne;
    }
    KEEP(a);  // tile loads do not tell the compiler how much they read
    KEEP(b);
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_loadd(6, a, 64);
    _tile_loadd(7, b, 64);
    for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_dpbf16ps(4, 6, 7);
        _tile_dpbf16ps(5, 6, 7);
    }
    _tile_release();
}

#endif

template <class T>
std::vector<FlopsProbe> multiply_adds() {
    std::vector<FlopsProbe> usable;
#if defined(__x86_64__)
    if (has_features({"avx512f"})) usable.push_back(avx512::multiply_add_probe<T>);
    if (has_features({"avx2", "fma"})) usable.push_back(avx2::multiply_add_probe<T>);  // some CPUs run 512 bits at half the rate
    if (!usable.empty()) return usable;
#endif
    usable.push_back(baseline::multiply_add_probe<T>);
    return usable;
}

}  // namespace

// float16 is converted to float32 first, and so is bfloat16 where nothing better exists.
std::vector<FlopsProbe> flops_probes(const std::string& dtype) {
    if (dtype == "float64") return multiply_adds<double>();
    std::vector<FlopsProbe> usable = multiply_adds<float>();
#if defined(__x86_64__)
    if (dtype == "bfloat16" && has_features({"amx_tile", "amx_bf16"})) {
        return {{kTileChains * 16 * 16 * 32 * 2.0, tile_bf16}};  // at least eight times as much in a cycle as any vector
    }
    if (dtype == "bfloat16" && has_features({"avx512f", "avx512_bf16"})) usable.push_back({kDotChains * 16 * 4.0, dot_bf16});
#endif
    return usable;
}

const MemoryProbes& memory_probes() {
#if defined(__x86_64__)
    if (has_features({"avx512f"})) return avx512::memory_probes;
    if (has_features({"avx2", "fma"})) return avx2::memory_probes;
#endif
    return baseline::memory_probes;
}

}  // namespace dlkernels::host

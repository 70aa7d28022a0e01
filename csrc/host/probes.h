// The probe loops for one instruction set. Included once per set (by probes.cpp), each time with
//   PROBE_ISA        the namespace                       PROBE_TARGET       the function attribute that enables the instructions
//   PROBE_BYTES      width of a vector register          PROBE_CHAINS       accumulators that fit beside two constants
//   PROBE_STREAM(p, v)   store v to *p past the caches
// so that the loops themselves are plain C++ on vector types. No include guard: that is the point.

namespace dlkernels::host::PROBE_ISA {

// Independent chains of acc = acc * a + b, in registers only: enough of them to hide the latency of the multiply-add. The values tend
// to 2: none becomes infinite or denormal.
template <class T>
PROBE_TARGET void multiply_add(std::int64_t repeats) {
    typedef T Vector __attribute__((vector_size(PROBE_BYTES)));
    T half = 0.5, one = 1;
    HIDE(half);
    HIDE(one);
    const Vector a = Vector{} + half, b = Vector{} + one;
    Vector acc[PROBE_CHAINS];
    for (int chain = 0; chain < PROBE_CHAINS; ++chain) acc[chain] = Vector{} + T(chain);  // equal chains would become one
    for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
#pragma GCC unroll 32
        for (int chain = 0; chain < PROBE_CHAINS; ++chain) acc[chain] = acc[chain] * a + b;
    }
    for (int chain = 1; chain < PROBE_CHAINS; ++chain) acc[0] += acc[chain];
    const Vector sum = acc[0];
    KEEP(sum);
}

template <class T>
inline const FlopsProbe multiply_add_probe = {2.0 * PROBE_CHAINS * PROBE_BYTES / sizeof(T), multiply_add<T>};

// May alias anything, like char: the probes move bytes.
typedef float Floats __attribute__((vector_size(PROBE_BYTES), may_alias));
typedef long long Bits __attribute__((vector_size(PROBE_BYTES), may_alias));
constexpr int kUnroll = kBlockBytes / PROBE_BYTES;

// Every memory probe passes `passes` times over arrays of `bytes` (a multiple of kBlockBytes) that lie one behind the other.

PROBE_TARGET inline void read(char* memory, std::int64_t bytes, std::int64_t passes) {
    for (std::int64_t pass = 0; pass < passes; ++pass) {
        const volatile Bits* x = reinterpret_cast<const Bits*>(memory);  // volatile: every load happens, though nobody wants the value
        for (std::int64_t byte = 0; byte < bytes; byte += kBlockBytes, x += kUnroll) {
#pragma GCC unroll 32
            for (int i = 0; i < kUnroll; ++i) static_cast<void>(x[i]);
        }
    }
}

template <bool Stream>
PROBE_TARGET void copy(char* memory, std::int64_t bytes, std::int64_t passes) {
    for (std::int64_t pass = 0; pass < passes; ++pass) {
        const Bits* x = reinterpret_cast<const Bits*>(memory);
        Bits* y = reinterpret_cast<Bits*>(memory + bytes);
        for (std::int64_t byte = 0; byte < bytes; byte += kBlockBytes, x += kUnroll, y += kUnroll) {
#pragma GCC unroll 32
            for (int i = 0; i < kUnroll; ++i) {
                if constexpr (Stream) PROBE_STREAM(y + i, x[i]); else y[i] = x[i];
            }
            FORGET_MEMORY();  // or the compiler calls memcpy
        }
    }
}

// z = x + s y
template <bool Stream>
PROBE_TARGET void triad(char* memory, std::int64_t bytes, std::int64_t passes) {
    const Floats s = Floats{} + 0.5f;
    for (std::int64_t pass = 0; pass < passes; ++pass) {
        const Floats* x = reinterpret_cast<const Floats*>(memory);
        const Floats* y = reinterpret_cast<const Floats*>(memory + bytes);
        Floats* z = reinterpret_cast<Floats*>(memory + 2 * bytes);
        for (std::int64_t byte = 0; byte < bytes; byte += kBlockBytes, x += kUnroll, y += kUnroll, z += kUnroll) {
#pragma GCC unroll 32
            for (int i = 0; i < kUnroll; ++i) {
                const Floats sum = x[i] + s * y[i];
                if constexpr (Stream) PROBE_STREAM(z + i, sum); else z[i] = sum;
            }
            FORGET_MEMORY();
        }
    }
}

inline const MemoryProbes memory_probes = {read, copy<false>, copy<true>, triad<false>, triad<true>};

}  // namespace dlkernels::host::PROBE_ISA

#undef PROBE_ISA
#undef PROBE_TARGET
#undef PROBE_BYTES
#undef PROBE_CHAINS
#undef PROBE_STREAM

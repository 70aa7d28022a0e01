// CPU features. An instruction set counts only where the CPU has it (cpuid) AND the operating system saves its registers
// (xgetbv): a kernel booted with `noxsave`, an old hypervisor or a missing AMX permission turn a reported feature into SIGILL.
#include "cpu.h"

#if defined(__x86_64__)

#include <cpuid.h>

#include <array>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dlkernels::host {
namespace {

using Registers = std::array<unsigned, 4>;
enum Register { EAX, EBX, ECX, EDX };

// Bits of XCR0: the register files that the operating system saves at a context switch.
constexpr std::uint64_t kNone = 0, kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

struct Feature {
    const char* name;
    unsigned leaf, subleaf;
    Register where;
    int bit;
    std::uint64_t xcr0;
};

constexpr Feature kFeatures[] = {
    {"sse4_2", 1, 0, ECX, 20, kNone},
    {"popcnt", 1, 0, ECX, 23, kNone},
    {"bmi1", 7, 0, EBX, 3, kNone},
    {"bmi2", 7, 0, EBX, 8, kNone},
    {"avx", 1, 0, ECX, 28, kYmm},
    {"f16c", 1, 0, ECX, 29, kYmm},
    {"fma", 1, 0, ECX, 12, kYmm},
    {"avx2", 7, 0, EBX, 5, kYmm},
    {"avx_vnni", 7, 1, EAX, 4, kYmm},
    {"avx512f", 7, 0, EBX, 16, kZmm},
    {"avx512dq", 7, 0, EBX, 17, kZmm},
    {"avx512cd", 7, 0, EBX, 28, kZmm},
    {"avx512bw", 7, 0, EBX, 30, kZmm},
    {"avx512vl", 7, 0, EBX, 31, kZmm},
    {"avx512_vnni", 7, 0, ECX, 11, kZmm},
    {"avx512_bf16", 7, 1, EAX, 5, kZmm},
    {"avx512_fp16", 7, 0, EDX, 23, kZmm},
    {"amx_tile", 7, 0, EDX, 24, kTiles},
    {"amx_int8", 7, 0, EDX, 25, kTiles},
    {"amx_bf16", 7, 0, EDX, 22, kTiles},
    {"amx_fp16", 7, 1, EAX, 21, kTiles},
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
    Registers r{};
    const bool missing = subleaf > 0 && cpuid(leaf)[EAX] < subleaf;  // EAX of leaf 7 holds its last subleaf
    if (missing || !__get_cpuid_count(leaf, subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX])) return {};
    return r;
}

std::uint64_t saved_registers() {
    constexpr unsigned kOsxsave = 1u << 27;
    if (!(cpuid(1)[ECX] & kOsxsave)) return 0;
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return std::uint64_t{high} << 32 | low;
}

}  // namespace

std::string cpu_vendor() {
    const Registers r = cpuid(0);
    char text[12];
    std::memcpy(text + 0, &r[EBX], 4);
    std::memcpy(text + 4, &r[EDX], 4);
    std::memcpy(text + 8, &r[ECX], 4);
    return std::string(text, sizeof text);
}

std::string cpu_brand() {
    if (__get_cpuid_max(0x80000000, nullptr) < 0x80000004) return "";
    char text[49] = {};
    for (unsigned part = 0; part < 3; ++part) {
        const Registers r = cpuid(0x80000002 + part);
        std::memcpy(text + 16 * part, r.data(), 16);
    }
    return text;
}

bool request_amx() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (saved_registers() & kTiles) == kTiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

std::vector<std::string> features() {
    std::uint64_t saved = saved_registers();
    if (!request_amx()) saved &= ~kTiles;
    std::vector<std::string> names;
    for (const Feature& f : kFeatures) {
        const bool present = cpuid(f.leaf, f.subleaf)[f.where] >> f.bit & 1;
        if (present && (saved & f.xcr0) == f.xcr0) names.emplace_back(f.name);
    }
    return names;
}

}  // namespace dlkernels::host

#else  // other architectures: nothing to dispatch on

namespace dlkernels::host {

std::string cpu_vendor() { return ""; }
std::string cpu_brand() { return ""; }
bool request_amx() { return false; }
std::vector<std::string> features() { return {}; }

}  // namespace dlkernels::host

#endif

// Which of the package's CPU libraries this machine can run, and which one it should.
#include <algorithm>

#include "cpu.h"

namespace dlkernels::host {
namespace {

struct Isa {
    const char* name;
    std::vector<std::string> adds;  // features beyond those of the line above
};

const std::vector<Isa>& ladder() {
    static const std::vector<Isa> isas = {
        {"default", {}},
        {"avx2", {"avx2", "fma", "f16c", "bmi1", "bmi2"}},
        {"avx512", {"avx512f", "avx512dq", "avx512vl", "avx512bw"}},
        {"avx512_bf16", {"avx512_bf16"}},
        {"avx512_amx", {"amx_tile", "amx_bf16"}},
    };
    return isas;
}

bool contains_all(const std::vector<std::string>& have, const std::vector<std::string>& wanted) {
    return std::all_of(wanted.begin(), wanted.end(),
                       [&](const std::string& name) { return std::find(have.begin(), have.end(), name) != have.end(); });
}

}  // namespace

bool has_features(const std::vector<std::string>& wanted) { return contains_all(features(), wanted); }

std::vector<std::string> supported_isas() {
    const std::vector<std::string> have = features();
    std::vector<std::string> names;
    for (const Isa& isa : ladder()) {
        if (!contains_all(have, isa.adds)) break;
        names.emplace_back(isa.name);
    }
    return names;
}

std::string preferred_isa() {
    std::vector<std::string> names = supported_isas();
    // Intel's vdpbf16ps does half as many multiply-adds a second as its float32 FMA, AMD's twice as many.
    if (names.back() == "avx512_bf16" && cpu_vendor() == "GenuineIntel") names.pop_back();
    return names.back();
}

}  // namespace dlkernels::host

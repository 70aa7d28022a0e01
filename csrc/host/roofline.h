// The two limits of the roofline: how fast this machine multiplies and adds, and how fast it moves bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dlkernels::host {

// probes.cpp: the loops this CPU can run, those that may be its fastest
struct FlopsProbe {
    double flops;                       // per repeat
    void (*run)(std::int64_t repeats);  // on the calling thread, registers only
};
std::vector<FlopsProbe> flops_probes(const std::string& dtype);

constexpr std::int64_t kBlockBytes = 512;  // memory probes move a multiple of this
using MemoryProbe = void (*)(char* memory, std::int64_t bytes, std::int64_t passes);
struct MemoryProbes {
    MemoryProbe read, copy, streaming_copy, triad, streaming_triad;  // streaming: stores that bypass the caches
};
const MemoryProbes& memory_probes();

// roofline.cpp
double peak_flops(const std::string& dtype, int threads, double seconds);                       // flop/s
double bandwidth(std::int64_t bytes, int threads, double seconds, const std::string& kind);  // byte/s, read + written

}  // namespace dlkernels::host

// What this process may use of the CPU: its instructions, cores and caches.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dlkernels::host {

struct Cores {
    int logical;   // hardware threads this process may run on
    int physical;  // cores behind them
};

struct Caches {  // bytes of one instance, 0 where unknown or absent
    std::int64_t l1d, l2, l3;
};

// cpuid.cpp
std::string cpu_vendor();             // "GenuineIntel", "AuthenticAMD", ...; "" on other architectures
std::string cpu_brand();              // the CPU's own product name; "" on other architectures
std::vector<std::string> features();  // usable instruction sets, named as in /proc/cpuinfo
bool request_amx();                   // asks the kernel for the AMX tile registers; true once granted

// topology.cpp
std::string cpu_name();
Cores cores();
Caches cache_bytes();
std::vector<int> cpus_by_core();  // hardware threads this process may use: one of each core first, then their siblings
void pin_this_thread(int cpu);    // a wish: where the system cannot, the thread stays free

// isa.cpp
bool has_features(const std::vector<std::string>& wanted);
std::vector<std::string> supported_isas();
std::string preferred_isa();

}  // namespace dlkernels::host

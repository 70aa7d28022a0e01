// The CPU's name, and the cores and caches that are this process's to use. Linux says it in files; elsewhere we ask the C++ library.
#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#include "cpu.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace dlkernels::host {
namespace {

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

std::string cpu_folder(int cpu) { return "/sys/devices/system/cpu/cpu" + std::to_string(cpu); }

// The hardware threads that the scheduler may give this process (taskset, cpuset), by number.
std::vector<int> allowed_cpus() {
    std::vector<int> cpus;
#if defined(__linux__)
    for (int limit = 1024; limit <= 1 << 16 && cpus.empty(); limit *= 2) {  // fails while `limit` is below the kernel's own
        cpu_set_t* set = CPU_ALLOC(limit);
        const std::size_t size = CPU_ALLOC_SIZE(limit);
        if (set != nullptr && sched_getaffinity(0, size, set) == 0) {
            for (int cpu = 0; cpu < limit; ++cpu) {
                if (CPU_ISSET_S(cpu, size, set)) cpus.push_back(cpu);
            }
        }
        if (set != nullptr) CPU_FREE(set);
    }
#endif
    if (cpus.empty()) {
        for (unsigned cpu = 0; cpu < std::max(1u, std::thread::hardware_concurrency()); ++cpu) cpus.push_back(static_cast<int>(cpu));
    }
    return cpus;
}

// CPUs' worth of time that one cgroup folder grants, or a huge number for "no limit".
double folder_quota(const std::string& folder) {
    constexpr double kUnlimited = 1e9;
    double quota = -1, period = 0;
    std::istringstream version2(first_line(folder + "/cpu.max"));  // "150000 100000" or "max 100000"
    if (!(version2 >> quota >> period)) {
        std::istringstream(first_line(folder + "/cpu.cfs_quota_us")) >> quota;  // -1: no limit
        std::istringstream(first_line(folder + "/cpu.cfs_period_us")) >> period;
    }
    return quota > 0 && period > 0 ? quota / period : kUnlimited;
}

// The tightest quota on the way from this process's cgroup to the root. A container may see its own group as the root.
double cgroup_quota() {
    double least = std::min(folder_quota("/sys/fs/cgroup"), folder_quota("/sys/fs/cgroup/cpu"));
    std::ifstream groups("/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {  // "0::/path" in version 2, "4:cpu,cpuacct:/path" in version 1
        const auto first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
        const bool version2 = controllers == ",,";
        if (!version2 && controllers.find(",cpu,") == std::string::npos) continue;
        for (std::string path = line.substr(second + 1); path.size() > 1; path.erase(path.rfind('/'))) {
            least = std::min(least, folder_quota((version2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu") + path));
        }
    }
    return least;
}

std::string trimmed(const std::string& text) {
    const auto first = text.find_first_not_of(" \t"), last = text.find_last_not_of(" \t");
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

std::int64_t parse_size(const std::string& text) {  // "48K", "2048K", "1M"
    std::int64_t number = 0;
    char unit = ' ';
    std::istringstream(text) >> number >> unit;
    return unit == 'K' ? number << 10 : unit == 'M' ? number << 20 : number;
}

// The hardware threads that share a core with this one, as the system writes them: "0,64".
std::string core_of(int cpu) {
    const std::string siblings = first_line(cpu_folder(cpu) + "/topology/thread_siblings_list");
    return siblings.empty() ? std::to_string(cpu) : siblings;
}

}  // namespace

std::string cpu_name() {
    const std::string brand = trimmed(cpu_brand());
    if (!brand.empty()) return brand;
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        const auto colon = line.find(':');
        const bool named = line.rfind("model name", 0) == 0 || line.rfind("Hardware", 0) == 0 || line.rfind("cpu\t", 0) == 0;
        if (named && colon != std::string::npos) return trimmed(line.substr(colon + 1));
    }
    return "unknown";
}

Cores cores() {
    const std::vector<int> cpus = allowed_cpus();
    std::set<std::string> distinct;
    for (int cpu : cpus) distinct.insert(core_of(cpu));
    // Rounded down: a thread beyond the quota would be stopped for a part of every period, and all others wait for it.
    const int quota = std::max(1, static_cast<int>(cgroup_quota()));
    return {std::min(static_cast<int>(cpus.size()), quota), std::min(static_cast<int>(distinct.size()), quota)};
}

std::vector<int> cpus_by_core() {
    std::vector<int> first, second;
    std::set<std::string> seen;
    for (int cpu : allowed_cpus()) (seen.insert(core_of(cpu)).second ? first : second).push_back(cpu);
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

void pin_this_thread([[maybe_unused]] int cpu) {
#if defined(__linux__)
    cpu_set_t* set = CPU_ALLOC(cpu + 1);
    const std::size_t size = CPU_ALLOC_SIZE(cpu + 1);
    if (set == nullptr) return;
    CPU_ZERO_S(size, set);
    CPU_SET_S(cpu, size, set);
    sched_setaffinity(0, size, set);
    CPU_FREE(set);
#endif
}

Caches cache_bytes() {
    Caches caches{0, 0, 0};
    const std::string folder = cpu_folder(allowed_cpus().front()) + "/cache/index";
    for (int index = 0;; ++index) {
        const std::string cache = folder + std::to_string(index);
        const std::string level = first_line(cache + "/level");
        if (level.empty()) return caches;
        if (first_line(cache + "/type") == "Instruction") continue;
        const std::int64_t size = parse_size(first_line(cache + "/size"));
        if (level == "1") caches.l1d = size;
        if (level == "2") caches.l2 = size;
        if (level == "3") caches.l3 = size;
    }
}

}  // namespace dlkernels::host

// Work timed on several threads at once.
#pragma once

#include <cstdint>
#include <functional>

namespace dlkernels::host {

// Runs body(thread) on `threads` new threads, each on a core of its own where there are enough, and waits for them.
// Throws std::runtime_error, having run nothing, where the system refuses to start so many.
void run_team(int threads, const std::function<void(int)>& body);

// The highest rate, in units of `amount` per second, at which `threads` threads together did their work.
// work(thread, repeats) does one thread's share `repeats` times; `amount` is what all threads do in one repeat.
// All threads start a window behind a spin barrier and the slowest decides its length. The machine's limit is the best of many
// short windows: whatever else runs on the machine can only make a window slower.
double best_rate(int threads, double seconds, double amount, const std::function<void(int, std::int64_t)>& work);

// Throws std::invalid_argument naming what is out of range.
void check_threads(int threads);
void check_seconds(double seconds);

}  // namespace dlkernels::host

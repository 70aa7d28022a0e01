// Work timed on several threads at once.
#pragma once

#include <cstdint>
#include <functional>

namespace dlkernels::host {

// The highest rate, in units of `amount` per second, at which `threads` threads together did their work.
//   work(thread, repeats)   does one thread's share `repeats` times; `amount` is what all threads do in one repeat
//   prepare(thread)         runs once on each thread before anything is timed
// All threads start a window behind a spin barrier and the slowest decides its length. The machine's limit is the best of many
// short windows: whatever else runs on the machine can only make a window slower.
double best_rate(int threads, double seconds, double amount, const std::function<void(int, std::int64_t)>& work,
                 const std::function<void(int)>& prepare = [](int) {});

// Throws std::invalid_argument naming what is out of range.
void check_threads(int threads);
void check_seconds(double seconds);

}  // namespace dlkernels::host

// What a caller sees of the SIMT emulator: how the next launches of this OS thread run, and how they fail.
// Free of CUDA names, so that a host file can include it without the rest.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace simt {

// In which order ready blocks and threads run. A kernel that needs one of them is wrong on a GPU.
enum class Order : int { kForward, kReverse, kRandom };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;                   // of kRandom; every launch takes the next one
  int64_t resident = 1;                // blocks in flight at once; the next starts when one ends. 0: the whole grid
  int64_t step_limit = 20'000'000;     // spins and block barriers of one launch; more is a hang
  int64_t max_grid_x = (1ll << 31) - 1;  // what the launcher may ask for; lower it to see a kernel loop over its grid
};

inline Options& options() {
  static thread_local Options value;
  return value;
}

// A kernel broke a rule of the programming model: barrier not reached by all, deadlock, hang, ...
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace simt

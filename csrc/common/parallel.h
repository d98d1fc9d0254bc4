// Threads reach a CPU kernel through one function pointer: the torch binding passes torch's parallel_for, the host module
// a serial loop or std::thread. Kernels own no pool, so fork, torch.set_num_threads and sanitizers all behave.
#pragma once
#include <cstdint>
#include <memory>

namespace cobra {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  // Calls body on disjoint ranges that cover [begin, end), each at least `grain` long where possible.
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

  template <class F>
  void operator()(int64_t begin, int64_t end, int64_t grain, F&& f) const {
    if (begin >= end) return;
    using Fn = std::remove_reference_t<F>;
    run(begin, end, grain, [](int64_t b, int64_t e, void* context) { (*static_cast<Fn*>(context))(b, e); },
        const_cast<void*>(static_cast<const void*>(std::addressof(f))));
  }
};

inline void run_serial(int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) { body(begin, end, context); }

}  // namespace cobra

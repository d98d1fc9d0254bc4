// Who ran: one counter per compiled (op, backend), read by cobra_kernels.call_counts(). Kept here, inside the
// implementation, so that a compiled graph is counted too.
#pragma once
#include <atomic>
#include <cstdint>

namespace cobra {

struct CallCounter {
  CallCounter(const char* op, const char* backend) : op(op), backend(backend), next(first) { first = this; }
  void add() { count.fetch_add(1, std::memory_order_relaxed); }

  const char* op;
  const char* backend;
  std::atomic<int64_t> count{0};
  CallCounter* next;
  static inline CallCounter* first = nullptr;  // built by static initialisers, read-only afterwards
};

}  // namespace cobra

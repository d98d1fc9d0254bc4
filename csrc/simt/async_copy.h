// Asynchronous copies into shared memory (cp.async). A GPU may carry one out at any time between its start and the wait that
// covers it. Forward order takes the latest, reverse order the earliest, random order either: a copy that nobody waits for
// leaves NaN, one that starts before the last reader of its place is done destroys what that reader needs.
#pragma once
#include "simt/scheduler.h"

namespace simt {

struct AsyncCopy {
  AsyncCopy* next;
  void* to;
  const void* from;
  size_t bytes, zeros;
  unsigned group;
};

// The kernel's own accesses, so that sanitizers see them.
inline void carry_out(void* to, const void* from, size_t bytes, size_t zeros) {
  memcpy(to, from, bytes);
  memset(static_cast<char*>(to) + bytes, 0, zeros);
}

inline void start_copy(void* to, const void* from, size_t bytes, size_t zeros) {
  Thread& me = *current;
  if (machine->order == Order::kReverse || (machine->order == Order::kRandom && random_below(2))) return carry_out(to, from, bytes, zeros);
  AsyncCopy* const copy = static_cast<AsyncCopy*>(std::malloc(sizeof(AsyncCopy)));
  *copy = {nullptr, to, from, bytes, zeros, me.copy_group};
  AsyncCopy** end = &me.copies;
  while (*end) end = &(*end)->next;
  *end = copy;
}

inline void commit_copies() { ++current->copy_group; }

// Waits for all but the last `pending` groups.
inline void wait_copies(unsigned pending) {
  Thread& me = *current;
  while (AsyncCopy* const copy = me.copies) {
    if (copy->group + pending >= me.copy_group) break;
    carry_out(copy->to, copy->from, copy->bytes, copy->zeros);
    me.copies = copy->next;
    std::free(copy);
  }
}

}  // namespace simt

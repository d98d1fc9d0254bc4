// Blocks and threads of a launch. Each CUDA thread is a fiber that runs until it must wait; blocks take turns in slots,
// `Options::resident` of them at a time. The order of everything comes from Options::order.
//
// Under TSan the edges are those of CUDA: launch -> thread, barrier, __syncwarp, fence, end of a block -> the next block of
// its slot. Blocks in different slots are unordered, so with resident >= 2 a race between blocks is reported.
#pragma once
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "simt/fiber.h"
#include "simt/language.h"
#include "simt/options.h"

namespace simt {

constexpr int kWarpSize = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarpSize;
constexpr int kMaxSharedArrays = 32;
#if defined(SIMT_TSAN)
constexpr int kMaxFibers = 4096;  // TSan counts each as a thread and has room for 8128
#else
constexpr int kMaxFibers = 16384;  // two memory mappings each, of the 65530 that Linux gives a process
#endif
constexpr size_t kMaxStaticShared = 48 << 10, kMaxDynamicShared = 227 << 10;

struct Block;

// One CUDA thread.
struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  dim3 index;
  int linear = 0;

  // What it brings to the warp collective it waits in (warp.h).
  const void* in = nullptr;
  void* out = nullptr;
  int source = 0;

  Thread* next_waiting = nullptr;  // at the same named barrier

  // Its asynchronous copies that are not carried out yet, oldest first, and the number of the group that is open (async_copy.h).
  struct AsyncCopy* copies = nullptr;
  unsigned copy_group = 0;
};

// Lanes of a warp that meet in a collective under one mask.
using Exchange = void (*)(Thread* lanes, unsigned mask);
struct Meeting {
  unsigned mask = 0, arrived = 0;
  Exchange exchange = nullptr;
  int phase = 0;
  char token[2] = {};  // one per phase: a lane already in the next meeting must not order one that is still in this one
};
struct Warp {
  Meeting meetings[kWarpSize];
  unsigned exited = 0;  // lanes that left the kernel, or never existed
};

// A barrier that some of a block's threads wait at and others only arrive at (common/named_barrier.cuh).
constexpr int kNamedBarriers = 16;
struct NamedBarrier {
  int threads = 0, arrived = 0, phase = 0;
  Thread* waiting = nullptr;  // list, last come first
  char token[2] = {};
};

// A slot: the block that is in it now, its threads, its shared memory.
struct Block {
  dim3 index;
  int alive = 0;

  int at_barrier = 0, sum = 0, result = 0, phase = 0;  // __syncthreads and its reducing forms
  char barrier_token[2] = {};
  char start_token = 0, exit_token = 0;
  NamedBarrier named[kNamedBarriers];  // 0 is never used: it is __syncthreads

  Warp warps[kMaxWarps];
  Thread* waiting[kMaxThreads];
  std::unique_ptr<Thread[]> threads{new Thread[kMaxThreads]};

  struct SharedArray { const void* tag; void* memory; } shared[kMaxSharedArrays];
  int shared_count = 0;
  size_t shared_bytes = 0;
  void* dynamic = nullptr;

  Block* next_slot = nullptr;
};

// Everything that one OS thread needs to launch kernels. Fibers are parked between blocks and launches, not remade.
struct Machine {
  Fiber host;
  Block* slots = nullptr;  // list, grows to the largest number of resident blocks
  int64_t slot_count = 0;  // in use by this launch

  // The launch that runs now.
  dim3 grid, block;
  int threads = 0;
  size_t dynamic_bytes = 0;
  void (*call)(const void*) = nullptr;  // runs the kernel with the launch's arguments
  const void* arguments = nullptr;
  const int64_t* block_order = nullptr;
  int64_t blocks = 0, blocks_started = 0, blocks_done = 0, steps = 0, step_limit = 0;
  uint64_t random = 0;
  Order order = Order::kForward;
  char failure[512] = {};  // empty: none

  // Ready threads, a ring of a power of two.
  Thread** ready = nullptr;
  unsigned capacity = 0, head = 0, count = 0;

  void reserve_ready(unsigned threads) {
    if (std::bit_ceil(threads) <= capacity) return;
    capacity = std::bit_ceil(threads);
    std::free(ready);
    ready = static_cast<Thread**>(std::malloc(capacity * sizeof *ready));
  }
  ~Machine() {
    while (Block* const b = slots) {
      slots = b->next_slot;
      std::free(b->dynamic);  // left over in a failed launch
      for (int i = 0; i < b->shared_count; ++i) std::free(b->shared[i].memory);
      delete b;
    }
    std::free(ready);
  }
};

inline constinit thread_local Machine* machine = nullptr;
inline constinit thread_local Thread* current = nullptr;  // null outside a kernel

// Ends the launch: the launcher throws Failure with this message. Does not return.
template <class... Args>
[[noreturn]] SIMT_RUNTIME inline void fail(const char* format, Args... args) {
  Machine& m = *machine;
  const dim3 b = current->block->index, t = current->index;
  const int n = std::snprintf(m.failure, sizeof m.failure, "block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  std::snprintf(m.failure + n, sizeof m.failure - size_t(n), format, args...);
  release(m.failure);
  Fiber& from = current->fiber;
  current = nullptr;
  from.switch_to(m.host);
  std::abort();  // a failed launch never resumes its fibers
}

SIMT_RUNTIME inline unsigned random_below(unsigned n) {
  Machine& m = *machine;
  m.random = m.random * 6364136223846793005ull + 1442695040888963407ull;
  return unsigned((m.random >> 33) % n);
}

SIMT_RUNTIME inline void make_ready(Thread* t) {
  Machine& m = *machine;
  m.ready[(m.head + m.count++) & (m.capacity - 1)] = t;
}

// Threads that become ready together are queued in the launch's order.
SIMT_RUNTIME inline void make_ready(Thread** threads, int n) {
  const bool reverse = machine->order == Order::kReverse;
  for (int i = 0; i < n; ++i) make_ready(threads[reverse ? n - 1 - i : i]);
}

SIMT_RUNTIME inline Thread* take_ready() {
  Machine& m = *machine;
  if (m.order == Order::kRandom && m.count > 1) {
    Thread*& first = m.ready[m.head];
    Thread*& chosen = m.ready[(m.head + random_below(m.count)) & (m.capacity - 1)];
    Thread* const t = first;
    first = chosen;
    chosen = t;
  }
  Thread* const t = m.ready[m.head];
  m.head = (m.head + 1) & (m.capacity - 1);
  --m.count;
  return t;
}

// What everybody waits for, when nobody can run.
[[noreturn]] SIMT_RUNTIME inline void fail_deadlock() {
  Machine& m = *machine;
  const Block* slot = m.slots;
  for (int64_t i = 0; i < m.slot_count; ++i, slot = slot->next_slot) {
    const Block& b = *slot;
    if (b.alive == 0) continue;
    for (int w = 0; w < kMaxWarps; ++w)
      for (const Meeting& meeting : b.warps[w].meetings)
        if (meeting.arrived)
          fail("deadlock: warp %d waits in a collective with mask 0x%08x, only lanes 0x%08x came (%d of the block's %d threads wait in "
               "__syncthreads)", w, meeting.mask, meeting.arrived, b.at_barrier, b.alive);
    for (int id = 1; id < kNamedBarriers; ++id)
      if (b.named[id].waiting)
        fail("deadlock: barrier %d waits for %d threads, %d came", id, b.named[id].threads, b.named[id].arrived);
    fail("deadlock: %d of the block's %d threads wait in __syncthreads", b.at_barrier, b.alive);
  }
  std::abort();  // called only while a block is unfinished
}

// The current thread waits; somebody else runs until it is made ready and its turn comes.
SIMT_RUNTIME inline void wait() {
  Thread* const me = current;
  if (machine->count == 0) fail_deadlock();
  Thread* const next = take_ready();
  if (next == me) return;
  release(machine->failure);  // should the launch fail now, what this thread did comes before its memory is freed
  current = next;
  me->fiber.switch_to(next->fiber);
}

SIMT_RUNTIME inline void count_step() {
  if (++machine->steps > machine->step_limit)
    fail("hang: the launch passed its limit of %lld spins and barriers", static_cast<long long>(machine->step_limit));
}

// A thread that polls memory lets the others run.
SIMT_RUNTIME inline void spin() {
  count_step();
  make_ready(current);
  wait();
}

// Returns the sum of `value` over the block.
SIMT_RUNTIME inline int barrier(int value) {
  Block& b = *current->block;
  if (b.alive != machine->threads) fail("__syncthreads after %d threads of the block left the kernel", machine->threads - b.alive);
  char* const token = &b.barrier_token[b.phase];
  release(token);
  b.sum += value;
  b.waiting[b.at_barrier++] = current;
  if (b.at_barrier == b.alive) {
    count_step();
    b.result = b.sum;
    b.sum = b.at_barrier = 0;
    b.phase ^= 1;
    make_ready(b.waiting, b.alive);
  }
  wait();
  acquire(token);
  return b.result;
}

// barrier.sync and barrier.arrive: the thread comes to barrier `id`, which opens for `threads` of them.
SIMT_RUNTIME inline void named_barrier(int id, int threads, bool wait_there) {
  Block& b = *current->block;
  if (id < 1 || id >= kNamedBarriers) fail("barrier %d, a block has named barriers 1 to %d", id, kNamedBarriers - 1);
  if (threads <= 0 || threads % kWarpSize || threads > machine->threads)
    fail("barrier %d for %d threads, expected whole warps of a block of %d", id, threads, machine->threads);
  NamedBarrier& n = b.named[id];
  if (n.arrived && n.threads != threads) fail("barrier %d for %d threads, others came to it for %d", id, threads, n.threads);
  n.threads = threads;
  char* const token = &n.token[n.phase];
  release(token);
  if (wait_there) {
    current->next_waiting = n.waiting;
    n.waiting = current;
  }
  if (++n.arrived == threads) {
    count_step();
    Thread* woken[kMaxThreads];
    int count = 0;
    for (Thread* t = n.waiting; t; t = t->next_waiting) woken[kMaxThreads - ++count] = t;
    n.waiting = nullptr;
    n.arrived = 0;
    n.phase ^= 1;
    make_ready(woken + kMaxThreads - count, count);
  }
  if (!wait_there) return;
  wait();
  acquire(token);
}

// NaN in every float format, and an absurd index.
SIMT_RUNTIME inline void* poisoned_memory(size_t bytes) {
  void* const memory = std::malloc(bytes);  // exact size: ASan's redzone begins at the next byte
  if (!memory) fail("out of memory for shared arrays");
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(memory)[i] = 0xff;
  return memory;
}

// Backs a __shared__ variable; `tag` is its identity within the kernel.
SIMT_RUNTIME inline void* shared_array(const void* tag, size_t bytes) {
  Block& b = *current->block;
  for (int i = 0; i < b.shared_count; ++i)
    if (b.shared[i].tag == tag) {
      acquire(b.shared[i].memory);
      return b.shared[i].memory;
    }
  b.shared_bytes += bytes;
  if (b.shared_count == kMaxSharedArrays) fail("more than %d shared arrays", kMaxSharedArrays);
  if (b.shared_bytes > kMaxStaticShared) fail("%zu bytes of static shared memory, a block has %zu", b.shared_bytes, kMaxStaticShared);
  void* const memory = poisoned_memory(bytes);
  b.shared[b.shared_count++] = {tag, memory};
  release(memory);
  return memory;
}

// Puts the next block of the grid into slot `b` and queues its threads.
SIMT_RUNTIME inline void start_block(Block& b) {
  Machine& m = *machine;
  const int64_t linear = m.block_order[m.blocks_started++];
  const int64_t width = m.grid.x, height = m.grid.y;
  b.index = dim3(unsigned(linear % width), unsigned(linear / width % height), unsigned(linear / (width * height)));
  b.alive = m.threads;
  b.at_barrier = b.sum = b.shared_count = 0;
  b.shared_bytes = 0;
  for (NamedBarrier& n : b.named) n = NamedBarrier{};
  b.dynamic = m.dynamic_bytes ? poisoned_memory(m.dynamic_bytes) : nullptr;
  for (int w = 0; w * kWarpSize < m.threads; ++w) {
    Warp& warp = b.warps[w];
    for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
    const int lanes = m.threads - w * kWarpSize;
    warp.exited = lanes >= kWarpSize ? 0 : ~0u << lanes;
  }
  for (int i = 0; i < m.threads; ++i) {
    Thread& t = b.threads.get()[i];
    t.block = &b;
    t.linear = i;
    t.index = dim3(unsigned(i) % m.block.x, unsigned(i) / m.block.x % m.block.y, unsigned(i) / (m.block.x * m.block.y));
    b.waiting[i] = &t;
  }
  make_ready(b.waiting, m.threads);
  release(&b.start_token);
}

SIMT_RUNTIME inline void end_block(Block& b) {
  acquire(&b.exit_token);
  std::free(b.dynamic);
  for (int i = 0; i < b.shared_count; ++i) std::free(b.shared[i].memory);
  b.dynamic = nullptr;
  b.shared_count = 0;
  ++machine->blocks_done;
}

// All lanes of a warp collective are there: exchanges their values and lets them go on.
SIMT_RUNTIME inline void complete(Thread& some, Meeting& meeting) {
  Thread* const lanes = &some - some.linear % kWarpSize;
  meeting.exchange(lanes, meeting.arrived);
  Thread* woken[kWarpSize];
  int n = 0;
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (meeting.arrived >> lane & 1) woken[n++] = &lanes[lane];
  meeting.arrived = 0;
  meeting.phase ^= 1;
  make_ready(woken, n);
}

// A lane that leaves may be the last one that a collective waited for.
SIMT_RUNTIME inline void leave_warp(Thread& t) {
  Warp& warp = t.block->warps[t.linear / kWarpSize];
  warp.exited |= 1u << (t.linear % kWarpSize);
  for (Meeting& m : warp.meetings)
    if (m.arrived && m.arrived == (m.mask & ~warp.exited)) complete(t, m);
}

// Body of every fiber: runs the kernel once per block of its slot, for ever.
SIMT_RUNTIME inline void thread_main() {
  Thread& me = *current;
  me.fiber.arrived();
  for (;;) {
    acquire(&me.block->start_token);
    machine->call(machine->arguments);
    Block& b = *me.block;
    if (me.copies) fail("the thread left the kernel without waiting for its asynchronous copies");
    release(&b.exit_token);
    --b.alive;
    if (b.at_barrier) fail("the thread left the kernel while %d others wait in __syncthreads", b.at_barrier);
    leave_warp(me);
    if (b.alive == 0) {
      for (const NamedBarrier& n : b.named)
        if (n.arrived) fail("the block ended with %d of %d threads at barrier %d", n.arrived, n.threads, int(&n - b.named));
      end_block(b);
      if (machine->blocks_started < machine->blocks) start_block(b);
    }
    if (machine->count == 0) {
      if (machine->blocks_done < machine->blocks) fail_deadlock();
      current = nullptr;
      me.fiber.switch_to(machine->host);
    } else if (Thread* const next = take_ready(); next != &me) {
      current = next;
      me.fiber.switch_to(next->fiber);
    }
  }
}

// From the launcher: runs the queued threads, and all that they start, until the grid is done or failed.
SIMT_RUNTIME inline void run_until_done() {
  current = take_ready();
  machine->host.switch_to(current->fiber);
  current = nullptr;
}

}  // namespace simt

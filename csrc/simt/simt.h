// Runs CUDA C++ kernel source on a CPU, to prove it: README.md. Kernel files get this through common/launch.h.
#pragma once
#include <numeric>
#include <random>
#include <memory>
#include <type_traits>
#include <vector>

#include "simt/async_copy.h"
#include "simt/language.h"
#include "simt/options.h"
#include "simt/scheduler.h"
#include "simt/tensor_core.h"
#include "simt/warp.h"

#define threadIdx (::simt::current->index)
#define blockIdx (::simt::current->block->index)
#define blockDim (::simt::machine->block)
#define gridDim (::simt::machine->grid)
#define warpSize 32

inline void __syncthreads() { simt::barrier(0); }
inline int __syncthreads_count(int predicate) { return simt::barrier(predicate != 0); }
inline int __syncthreads_or(int predicate) { return simt::barrier(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return simt::barrier(predicate == 0) == 0; }
inline void __nanosleep(unsigned) { simt::spin(); }

namespace simt {

inline char fence_token = 0;
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9;  // cudaError_t

inline bool valid_launch(dim3 grid, dim3 block, size_t dynamic_bytes, int& error) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool grid_fits = grid.x && grid.y && grid.z && int64_t(grid.x) <= options().max_grid_x && grid.y <= 65535 && grid.z <= 65535;
  const bool block_fits = threads >= 1 && threads <= kMaxThreads && block.z <= 64;
  error = !grid_fits || !block_fits ? kInvalidConfiguration : dynamic_bytes > kMaxDynamicShared ? kInvalidValue : 0;
  return error == 0;
}

inline std::vector<int64_t> block_order(int64_t blocks, Order order, uint64_t seed) {
  std::vector<int64_t> result(blocks);
  std::iota(result.begin(), result.end(), int64_t(0));
  if (order == Order::kReverse) std::reverse(result.begin(), result.end());
  if (order == Order::kRandom) std::shuffle(result.begin(), result.end(), std::mt19937_64(seed));
  return result;
}

// One machine per OS thread; a failed launch replaces it, because its fibers stand in the middle of a kernel.
inline Machine& this_thread_machine(bool fresh = false) {
  static thread_local std::unique_ptr<Machine> owner;
  if (fresh || !owner) owner = std::make_unique<Machine>();
  return *(machine = owner.get());
}

// Runs call(arguments) once per thread. Returns a cudaError_t; throws Failure when the kernel breaks a rule.
inline int launch(dim3 grid, dim3 block, size_t dynamic_bytes, void (*call)(const void*), const void* arguments) {
  int error;
  if (!valid_launch(grid, block, dynamic_bytes, error)) return error;
  Options& chosen = options();
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  const int threads = int(block.x * block.y * block.z);
  const int64_t resident = chosen.resident <= 0 ? blocks : std::min(blocks, chosen.resident);
  if (resident * threads > kMaxFibers && resident > 1)
    throw Failure("simt: " + std::to_string(resident) + " resident blocks of " + std::to_string(threads) + " threads, at most " +
                  std::to_string(kMaxFibers) + " threads can be resident; make the test's grid smaller");

  Machine& m = this_thread_machine();
  m.host.adopt_this_thread();
  m.grid = grid;
  m.block = block;
  m.threads = threads;
  m.dynamic_bytes = dynamic_bytes;
  m.call = call;
  m.arguments = arguments;
  const std::vector<int64_t> order = block_order(blocks, chosen.order, chosen.seed);
  m.block_order = order.data();
  m.blocks = blocks;
  m.blocks_started = m.blocks_done = m.steps = 0;
  m.step_limit = chosen.step_limit;
  m.random = chosen.seed * 0x9E3779B97F4A7C15ull + 1;
  m.order = chosen.order;
  m.failure[0] = '\0';
  m.head = m.count = 0;
  m.reserve_ready(unsigned(resident) * unsigned(threads));
  m.slot_count = resident;
  Block** slot = &m.slots;
  for (int64_t i = 0; i < resident; ++i, slot = &(*slot)->next_slot) {
    if (!*slot) *slot = new Block;
    for (int t = 0; t < threads; ++t)
      if (!(*slot)->threads[t].fiber.created()) (*slot)->threads[t].fiber.create(&thread_main);
    start_block(**slot);
  }
  ++chosen.seed;

  run_until_done();
  Block* b = m.slots;
  for (int64_t i = 0; i < resident; ++i, b = b->next_slot) acquire(&b->exit_token);
  acquire(m.failure);
  if (m.failure[0]) {
    const std::string message = m.failure;
    this_thread_machine(/*fresh=*/true);
    throw Failure("simt: " + message);
  }
  return 0;
}

}  // namespace simt

// A fence orders what its thread did before with what others do after theirs. TSan gets one token for all fences:
// that orders more than a fence and a flag do, so it reports a missing fence but not a fence that guards the wrong flag.
SIMT_RUNTIME inline void __threadfence() {
#if !defined(SIMT_TSAN)
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
  simt::acquire(&simt::fence_token);
  simt::release(&simt::fence_token);
}
inline void __threadfence_block() { __threadfence(); }

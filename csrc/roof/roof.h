// The floors that kernels are judged by: how fast this CPU or GPU evaluates exp2 when nothing else is in the way, and what one
// GPU instruction costs alone. Only the benchmarks call it.
#pragma once
#include "common/parallel.h"

namespace cobra {

inline constexpr int64_t kExp2BlockSize = 4096;  // floats: 16 KB, resident in every L1

struct Exp2FloorParams {
  int64_t blocks;
  float* sums;  // (blocks,) sum of each block's exponentials, so that none can be left out
};

void exp2_floor_cpu(const Exp2FloorParams&, const Parallel&);

inline constexpr int kExp2Threads = 256, kExp2Chains = 8;  // exponentials per block and iteration: their product

struct Exp2FloorCudaParams {
  int64_t blocks, iterations;
  float* sums;         // (blocks, kExp2Threads)
  int64_t* stopwatch;  // (2,) of block 0: clocks of its multiprocessor, nanoseconds
};

int exp2_floor_cuda(const Exp2FloorCudaParams&, void* stream);

enum class Probe : int32_t { kExp2, kFma, kMmaTf32, kMmaBf16, kSharedBroadcast, kShuffle };

// One block on one multiprocessor: `warps` warps on each of its four schedulers, each issuing `chains` independent chains.
struct ProbeParams {
  Probe probe;
  int32_t chains;  // 1 (latency), 4 or 8
  int32_t warps;   // per scheduler, at most 8
  int64_t iterations;
  float* sink;      // (1024,)
  int64_t* clocks;  // (32,) per warp
};

int probe_cuda(const ProbeParams&, void* stream);

// Two blocks pass 512 bytes to each other in turn, through global memory and a flag, as a kernel that hands over between blocks does.
struct HandoverParams {
  int64_t rounds;
  uint32_t* flags;     // (2,) zero
  float* payload;      // (2, 128)
  int64_t* stopwatch;  // (3,) clocks, nanoseconds, rounds done (fewer: the other block never answered)
};

int handover_cuda(const HandoverParams&, void* stream);

}  // namespace cobra

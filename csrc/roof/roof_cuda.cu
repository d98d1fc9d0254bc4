// What one instruction costs on this GPU, and how fast exp2 can be. Timed by the multiprocessor's own clock; the benchmarks divide.
#include "common/cuda_math.cuh"
#include "common/reduce.cuh"
#include "roof/roof.h"

namespace cobra {
namespace {

constexpr int kSchedulers = 4, kMaxWarps = 8;

__device__ __forceinline__ int64_t nanoseconds() {
  int64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// x -> 2^-x settles at 0.641: no overflow, and the chain cannot be left out.
__global__ void __launch_bounds__(kExp2Threads) exp2_floor_kernel(const __grid_constant__ Exp2FloorCudaParams p) {
  float x[kExp2Chains];
#pragma unroll
  for (int k = 0; k < kExp2Chains; ++k) x[k] = float(threadIdx.x + k) * (1.f / kExp2Threads);
  const int64_t clocks = clock64(), time = nanoseconds();
#pragma unroll 4
  for (int64_t i = 0; i < p.iterations; ++i) {
#pragma unroll
    for (int k = 0; k < kExp2Chains; ++k) x[k] = exp2_fast(-x[k]);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.stopwatch[0] = clock64() - clocks;
    p.stopwatch[1] = nanoseconds() - time;
  }
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < kExp2Chains; ++k) sum += x[k];
  p.sums[int64_t(blockIdx.x) * kExp2Threads + threadIdx.x] = sum;
}

// One chain: `step` is one instruction whose result is its own next operand.
struct Exp2Chain {
  float x;
  __device__ void start(const float*, int lane) { x = float(lane) * 0.01f; }
  __device__ void step(uint32_t) { asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x)); }
  __device__ float end() const { return x; }
};

struct FmaChain {
  float x, y;
  __device__ void start(const float*, int lane) { x = float(lane), y = 0.999f; }
  __device__ void step(uint32_t) { asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(x) : "f"(y)); }
  __device__ float end() const { return x; }
};

// The factors are zeros that the compiler cannot see, the same for every chain: only accumulators differ.
template <bool kTf32>
struct MmaChain {  // m16n8k8 of tf32, m16n8k16 of bf16: both four and two registers
  float c[4];
  __device__ void start(const float*, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = float(lane);
  }
  __device__ void step(uint32_t zero) {
    if constexpr (kTf32)
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(zero));
    else
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(zero));
  }
  __device__ float end() const { return c[0] + c[1] + c[2] + c[3]; }
};

struct SharedBroadcastChain {  // 16 bytes, the same for every lane; the next address is all four words and-ed: two ALU instructions more
  uint32_t address;
  __device__ void start(const float* shared, int) { address = uint32_t(__cvta_generic_to_shared(shared)); }
  __device__ void step(uint32_t) {
    uint32_t r[4];
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
    address = r[0] & r[1] & r[2] & r[3];
  }
  __device__ float end() const { return float(address); }
};

struct ShuffleChain {
  float x;
  __device__ void start(const float*, int lane) { x = float(lane); }
  __device__ void step(uint32_t) { x = __shfl_xor_sync(0xffffffff, x, 1); }
  __device__ float end() const { return x; }
};

template <class Chain, int kChains>
__global__ void __launch_bounds__(kSchedulers* kMaxWarps* kWarp) probe_kernel(const __grid_constant__ ProbeParams p) {
  constexpr int kUnroll = 32 / kChains;
  COBRA_SHARED(float[4], shared);
  if (threadIdx.x == 0) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
    for (int i = 0; i < 4; ++i) shared[i] = __uint_as_float(address);
  }
  __syncthreads();
  Chain chain[kChains];
#pragma unroll
  for (int k = 0; k < kChains; ++k) chain[k].start(shared, int(threadIdx.x) + k);
  uint32_t zero;
  asm volatile("mov.u32 %0, 0;" : "=r"(zero));
  __syncthreads();
  const int64_t start = clock64();
#pragma unroll 1
  for (int64_t i = 0; i < p.iterations; i += kUnroll) {
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
#pragma unroll
      for (int k = 0; k < kChains; ++k) chain[k].step(zero);
    }
  }
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < kChains; ++k) sum += chain[k].end();
  asm volatile("" : : "f"(sum) : "memory");  // the last results have arrived before the clock is read
  const int64_t stop = clock64();
  p.sink[threadIdx.x] = sum;
  if (threadIdx.x % kWarp == 0) p.clocks[threadIdx.x / kWarp] = stop - start;
}

template <class Chain>
int launch_probe(const ProbeParams& p, void* stream) {
  const dim3 block(kSchedulers * p.warps * kWarp);
  switch (p.chains) {
    case 1: return launch(probe_kernel<Chain, 1>, dim3(1), block, 0, stream, p);
    case 4: return launch(probe_kernel<Chain, 4>, dim3(1), block, 0, stream, p);
    case 8: return launch(probe_kernel<Chain, 8>, dim3(1), block, 0, stream, p);
    default: return int(cudaErrorInvalidValue);
  }
}

// Block b waits for flags[b] = round, reads what the other wrote, writes its own, raises the other's flag. A warp a block.
__global__ void handover_kernel(const __grid_constant__ HandoverParams p) {
  constexpr int64_t kPatience = 1 << 22;  // polls: the other block may not be resident, and this must end
  const int me = blockIdx.x, lane = threadIdx.x;
  float4* const inbox = reinterpret_cast<float4*>(p.payload + me * 128) + lane;
  float4* const outbox = reinterpret_cast<float4*>(p.payload + (1 - me) * 128) + lane;
  float4 v = {float(lane), 1.f, 2.f, 3.f};
  const int64_t clocks = clock64(), time = nanoseconds();
  int64_t round = 0;
  for (; round < p.rounds; ++round) {
    if (me == 1 || round > 0) {
      uint32_t seen = 0;
      if (lane == 0) {
        for (int64_t poll = 0; poll < kPatience && seen < round + me; ++poll)
          asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(p.flags + me) : "memory");
      }
      seen = __shfl_sync(0xffffffff, seen, 0);
      if (seen < round + me) break;
      v = __ldcg(inbox);
    }
    v.x += 1.f;
    *outbox = v;
    __syncwarp();
    if (lane == 0) asm volatile("st.release.gpu.u32 [%0], %1;" : : "l"(p.flags + 1 - me), "r"(uint32_t(round + 1)) : "memory");
  }
  if (me == 0 && lane == 0) {
    p.stopwatch[0] = clock64() - clocks;
    p.stopwatch[1] = nanoseconds() - time;
    p.stopwatch[2] = round;
  }
}

}  // namespace

int exp2_floor_cuda(const Exp2FloorCudaParams& p, void* stream) {
  return launch(exp2_floor_kernel, dim3(unsigned(p.blocks)), dim3(kExp2Threads), 0, stream, p);
}

int probe_cuda(const ProbeParams& p, void* stream) {
  if (p.warps < 1 || p.warps > kMaxWarps) return int(cudaErrorInvalidValue);
  switch (p.probe) {
    case Probe::kExp2: return launch_probe<Exp2Chain>(p, stream);
    case Probe::kFma: return launch_probe<FmaChain>(p, stream);
    case Probe::kMmaTf32: return launch_probe<MmaChain<true>>(p, stream);
    case Probe::kMmaBf16: return launch_probe<MmaChain<false>>(p, stream);
    case Probe::kSharedBroadcast: return launch_probe<SharedBroadcastChain>(p, stream);
    case Probe::kShuffle: return launch_probe<ShuffleChain>(p, stream);
  }
  return int(cudaErrorInvalidValue);
}

int handover_cuda(const HandoverParams& p, void* stream) { return launch(handover_kernel, dim3(2), dim3(kWarp), 0, stream, p); }

}  // namespace cobra

// Kernels that use every part of the language that the emulator offers, each with one right answer. nvcc compiles the same
// file, so the emulator's dialect stays CUDA; a GPU must give the same numbers.
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/named_barrier.cuh"
#include "common/sync.cuh"
#include "simt/probe.h"

namespace cobra {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// out[thread][0..15]: what each lane sees of shuffles and votes.
__global__ void warp_kernel(ProbeParams p) {
  const int lane = int(threadIdx.x) % 32;
  int* const out = p.out + int64_t(threadIdx.x) * 16;
  out[0] = __shfl_sync(kAll, lane * 10, 5);
  out[1] = __shfl_sync(kAll, lane * 10, lane + 3, 8);
  out[2] = __shfl_up_sync(kAll, lane, 2);
  out[3] = __shfl_up_sync(kAll, lane, 2, 8);
  out[4] = __shfl_down_sync(kAll, lane, 3);
  out[5] = __shfl_down_sync(kAll, lane, 3, 4);
  out[6] = __shfl_xor_sync(kAll, lane, 1);
  out[7] = __shfl_xor_sync(kAll, lane, 16, 8);
  out[8] = int(__ballot_sync(kAll, lane % 3 == 0));
  out[9] = __any_sync(kAll, lane == 7);
  out[10] = __all_sync(kAll, lane < 31);
  // Two halves of a warp meet apart, under masks of their own.
  if (lane < 16)
    out[11] = __shfl_sync(0x0000ffffu, lane, 3);
  else
    out[11] = __shfl_sync(0xffff0000u, lane, 20);
  const float4 four = make_float4(float(lane), 1.f, 2.f, 3.f);
  out[12] = int(__shfl_sync(kAll, four.x, 9) + four.w);
  out[13] = int(__shfl_xor_sync(kAll, double(lane), 2));
  out[14] = __popc(unsigned(lane)) + 100 * __ffs(lane) + 10000 * __clz(lane);
  if (lane >= 24) return;  // a collective waits for lanes that are still there
  out[15] = int(__ballot_sync(kAll, 1));
}

// Barriers, their reducing forms, static and dynamic shared memory, atomics.
__global__ void block_kernel(ProbeParams p) {
  COBRA_SHARED(int[64], reversed);
  COBRA_SHARED(unsigned, counter);
  COBRA_DYNAMIC_SHARED(float2, pairs);
  const int n = int(blockDim.x), i = int(threadIdx.x);
  int* const out = p.out + (int64_t(blockIdx.x) * n + i) * 8;
  reversed[i] = i;
  pairs[i] = make_float2(float(i), 1.f);
  if (i == 0) counter = 0;
  __syncthreads();
  out[0] = reversed[n - 1 - i];
  out[1] = int(pairs[n - 1 - i].x);
  atomicAdd(&counter, 2u);
  out[2] = __syncthreads_count(i % 2);
  out[3] = int(counter);
  out[4] = __syncthreads_or(i == 3);
  out[5] = __syncthreads_and(i != 3);
  if (i / 32 == 0) {  // within a warp, __syncwarp is enough
    reversed[i] = 2 * i;
    __syncwarp();
    out[6] = reversed[31 - i];
  }
  out[7] = int(atomicMax(p.maximum, int(blockIdx.x) * n + i) <= int(gridDim.x) * n);
}

// Each block adds its number to the running sum of the block before it: it needs that block to run, too. Blocks number
// themselves as they start, because a GPU may start them in any order.
__global__ void chain_kernel(ProbeParams p) {
  COBRA_SHARED(unsigned, number);
  if (threadIdx.x == 0) number = atomicAdd(p.ticket, 1u);
  __syncthreads();
  const unsigned mine = p.by_block_index ? blockIdx.x : number;
  if (threadIdx.x == 0) {
    int before = 0;
    if (mine > 0) {
      while (load_acquire(&p.flags[mine - 1]) == 0) pause_spin();
      before = p.out[mine - 1];
    }
    p.out[mine] = before + int(mine);
    if (!p.forget_flag) store_release(&p.flags[mine], 1u);
  }
}

// Rounding of the 16-bit floats: bits of in[i] in bf16 (low half) and fp16 (high half).
__global__ void round_kernel(ProbeParams p) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.count) return;
  const __nv_bfloat16 b = __float2bfloat16_rn(p.in[i]);
  const __half h = __float2half_rn(p.in[i]);
  uint16_t low, high;
  memcpy(&low, &b, 2);
  memcpy(&high, &h, 2);
  p.out[i] = int(unsigned(low) | unsigned(high) << 16);
}

__constant__ int kTable[4] = {3, 1, 4, 1};

// Everything else of language.h, one number per line; blocks and threads of three dims.
__global__ void language_kernel(ProbeParams p) {
  const int thread = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  const int block = int(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  const int threads = int(blockDim.x * blockDim.y * blockDim.z);
  int* const out = p.out + (int64_t(block) * threads + thread) * 16;
  out[0] = block * 1000 + thread;
  out[1] = kTable[thread % 4] * warpSize;
  const int4 four = make_int4(1, 2, 3, thread);
  const int2 two = make_int2(four.x, four.w);
  const uint4 words = make_uint4(1, 2, 3, unsigned(two.y));
  const uint2 pair = make_uint2(words.z, words.w);
  out[2] = int(pair.x * pair.y) + four.y + two.x;
  out[3] = __ldg(p.in) == 2.f && __ldcs(p.in + 1) == 3.f && __ldcg(p.in + 2) == 4.f;
  __stcs(out + 4, thread);
  __stcg(out + 5, block);
  const __nv_bfloat162 halves = __floats2bfloat162_rn(1.5f, float(thread));
  const __half2 more = __floats2half2_rn(2.5f, float(thread));
  out[6] = int(2.f * __bfloat162float(halves.x) + __bfloat162float(halves.y));
  out[7] = int(2.f * __half2float(more.x) + __half2float(more.y));
  out[8] = int(100.f * (__expf(1.f) + __logf(2.f) + __fdividef(1.f, 4.f) + rsqrtf(4.f) + __frcp_rn(8.f)));
  out[9] = atomicMin(p.maximum, -thread) <= 0;
  __threadfence();
  __threadfence_block();
  if (thread == 0) {  // one thread per block: the others' updates are done or not
    out[10] = int(atomicCAS(p.flags + block, 0u, 7u));
    out[11] = int(atomicCAS(p.flags + block, 0u, 9u));
    out[12] = int(atomicExch(p.flags + block, 5u));
    out[13] = int(p.flags[block]);
  }
}

// One warp: D = A B + C of in = A (16, 8), B (8, 8), C (16, 8); out: the bits of D (16, 8).
__global__ void mma_kernel(ProbeParams p) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  const float *const A = p.in, *const B = A + 128, *const C = B + 64;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = C[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k8_tf32(d, A[g * 8 + t], A[(g + 8) * 8 + t], A[g * 8 + t + 4], A[(g + 8) * 8 + t + 4], B[t * 8 + g], B[(t + 4) * 8 + g]);
  for (int i = 0; i < 4; ++i) memcpy(&p.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2], &d[i], 4);
}

// Warps 0 and 1 copy pieces of `in` (rounds, 64, 4) to warps 2 and 3, two rounds ahead: out[round][thread] = the first two numbers of
// the piece of another thread. The last round has zeros. what = 1: nobody waits for the copies before the others read;
// 2: a place is written again without waiting for its readers.
__global__ void producer_consumer_kernel(ProbeParams p) {
  COBRA_SHARED(float4[2][64], piece);
  const int thread = int(threadIdx.x) % 64, rounds = p.count / 256;
  const bool produces = threadIdx.x < 64;
  for (int round = 0; round < rounds; ++round) {
    const int half = round % 2, full = 1 + half, empty = 3 + half;
    if (produces) {
      if (round >= 2 && p.what != 2) barrier_sync(empty, 128);
      copy_async_16(&piece[half][thread], p.in + (int64_t(round) * 64 + thread) * 4, round < rounds - 1);
      copy_async_commit();
      if (p.what != 1) copy_async_wait<0>();
      barrier_arrive(full, 128);
      if (p.what == 2 && round >= 2) barrier_sync(empty, 128);
    } else {
      barrier_sync(full, 128);
      const float4 v = piece[half][63 - thread];
      p.out[(int64_t(round) * 64 + thread) * 2] = int(v.x);
      p.out[(int64_t(round) * 64 + thread) * 2 + 1] = int(v.y);
      if (round + 2 < rounds) barrier_arrive(empty, 128);
    }
  }
  copy_async_wait<0>();
}

// Kernels that must fail: what = 0 half the block misses a barrier, 1 a thread leaves before it, 2 a lane misses a
// shuffle, 3 a lane calls one without being in its mask, 4 lanes of one mask call different collectives, 5 a named barrier waits
// for ever, 6 its threads disagree on their number, 7 some arrive and nobody comes, 8 a copy is not waited for.
__global__ void broken_kernel(ProbeParams p) {
  const int i = int(threadIdx.x);
  if (p.what == 0 && i < 32) __syncthreads();
  if (p.what == 0) p.out[i] = __shfl_sync(kAll, i, 0);
  if (p.what == 1 && i == 40) return;
  if (p.what == 1) __syncthreads();
  if (p.what == 2 && i != 5) p.out[i] = __shfl_sync(kAll, i, 0);
  if (p.what == 2) __syncthreads();
  if (p.what == 3) p.out[i] = __shfl_sync(0x7fffffffu, i, 0);
  if (p.what == 4) p.out[i] = i % 2 ? __shfl_sync(kAll, i, 0) : __any_sync(kAll, i);
  if (p.what == 5 && i < 32) barrier_sync(3, 64);
  if (p.what == 6) barrier_sync(3, i % 2 ? 32 : 64);
  if (p.what == 7 && i < 32) barrier_arrive(3, 64);
  if (p.what == 8) {
    COBRA_SHARED(float4[64], piece);
    copy_async_16(&piece[i], p.in, false);
  }
}

}  // namespace

int probe_cuda(const ProbeParams& p, void* stream) {
  switch (p.kernel) {
    case 0: return launch(&warp_kernel, dim3(1), dim3(64), 0, stream, p);
    case 1: return launch(&block_kernel, dim3(unsigned(p.blocks)), dim3(64), 64 * sizeof(float2), stream, p);
    case 2: return launch(&chain_kernel, dim3(unsigned(p.blocks)), dim3(32), 0, stream, p);
    case 3: return launch(&round_kernel, dim3(unsigned(p.blocks)), dim3(128), 0, stream, p);
    case 4: return launch(&broken_kernel, dim3(1), dim3(64), 0, stream, p);
    case 5: return launch(&language_kernel, dim3(1, 2, unsigned(p.blocks)), dim3(5, 3, 2), 0, stream, p);
    case 6: return launch(&mma_kernel, dim3(1), dim3(32), 0, stream, p);
    case 7: return launch(&producer_consumer_kernel, dim3(1), dim3(128), 0, stream, p);
    default: return launch(&round_kernel, dim3(unsigned(p.blocks), 1, 1), dim3(2048), 0, stream, p);  // more than a block holds
  }
}

}  // namespace cobra

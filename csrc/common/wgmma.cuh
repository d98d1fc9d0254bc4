// Matrix products of a warpgroup (128 threads) straight from shared memory: wgmma, on sm_90a only. They run asynchronously, in
// groups, as copies do. In the emulator forward order carries them out at the wait that demands it, reverse order at once, random
// order either: an operand overwritten too early and one that has not arrived both show.
#pragma once
#include "common/cuda_dtype.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
#define COBRA_HAS_WGMMA 1
#else
#define COBRA_HAS_WGMMA 0
#endif

namespace cobra {

constexpr int kMatrixAlignment = 1024;

// A matrix in shared memory whose rows are 64 elements of 16 bits: 128 bytes, 8 rows to a group of 1024, on a 1024-byte boundary;
// 16-byte chunk c of row r lies in the place of chunk c ^ (r % 8). wgmma reads 16 channels of it, from channel 16 k on.
#if defined(__CUDACC__)
using SharedMatrix = uint64_t;
__device__ __forceinline__ SharedMatrix shared_matrix(const void* base, int k) {
#if COBRA_HAS_WGMMA
  constexpr uint64_t kGroup = uint64_t(1024 / 16) << 32, kSwizzle128 = uint64_t(1) << 62;
  return (uint64_t(__cvta_generic_to_shared(base)) + uint64_t(k) * 32) / 16 | kGroup | kSwizzle128;
#else
  return 0;
#endif
}
#else
struct SharedMatrix {
  const char* base;
  int k;

  // As the unit finds an element: the address in a plain layout, then bits 4..6 turned by bits 7..9.
  template <class T>
  float at(int row, int channel) const {
    const uintptr_t plain = reinterpret_cast<uintptr_t>(base) + k * 32 + row * 128 + channel * 2;
    T v;
    memcpy(&v, reinterpret_cast<const void*>(plain ^ (plain >> 7 & 7) << 4), sizeof v);
    return to_float(v);
  }
};
inline SharedMatrix shared_matrix(const void* base, int k) {
  if (reinterpret_cast<uintptr_t>(base) % kMatrixAlignment) simt::fail("shared_matrix: not on a 1024-byte boundary");
  return {static_cast<const char*>(base), k};
}
#endif

// d (64, 256) of one warpgroup. Lane 4g + t of its warp w holds (16 w + g, 8 j + 2t), (.., + 1) in d[4j], d[4j + 1], the same of row
// + 8 in d[4j + 2], d[4j + 3].
#if !defined(__CUDACC__)
template <class T>
struct WarpgroupProducts {
  static constexpr int kMost = 16;
  struct Product {
    float* d;
    SharedMatrix a, b;
    int group;
  };
  Product pending[kMost];
  int count = 0, group = 0;

  static void carry_out(const Product& product) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    float a[2][16], b[16];
    for (int i = 0; i < 32; ++i) a[i / 16][i % 16] = product.a.template at<T>(row + i / 16 * 8, i % 16);
    for (int col = 0; col < 64; ++col) {
      for (int k = 0; k < 16; ++k) b[k] = product.b.template at<T>(col / 2 * 8 + threadIdx.x % 4 * 2 + col % 2, k);
      for (int i = 0; i < 2; ++i) {
        float& d = product.d[col / 2 * 4 + i * 2 + col % 2];
        double sum = d;
        for (int k = 0; k < 16; ++k) sum += double(a[i][k]) * b[k];
        d = float(sum);
      }
    }
  }
  void add(float (&d)[128], SharedMatrix a, SharedMatrix b) {
    const Product product{d, a, b, group};
    if (simt::machine->order == simt::Order::kReverse || (simt::machine->order == simt::Order::kRandom && simt::random_below(2)))
      return carry_out(product);
    if (count == kMost) simt::fail("wgmma: more than %d products under way", kMost);
    pending[count++] = product;
  }
  void commit() { ++group; }
  template <int kPending>
  void wait() {
    int done = 0;
    while (done < count && pending[done].group + kPending < group) carry_out(pending[done++]);
    for (int i = done; i < count; ++i) pending[i - done] = pending[i];
    count -= done;
  }
  void fence(float (&)[128]) {}
};
#else
#if COBRA_HAS_WGMMA
// d += a b^T for operands of `type`; the accumulators have to be written out one by one.
#define COBRA_WGMMA(type, d, a, b) \
  asm volatile( \
      "{.reg .pred add; setp.eq.u32 add, 0, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, add, 1, 1, 0, 0;}" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
        "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
        "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
        "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
        "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
        "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
        "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
        "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]) \
      : "l"(a), "l"(b))
#endif

template <class T>
struct WarpgroupProducts {
#if COBRA_HAS_WGMMA
  // d += a b^T, 16 channels.
  __device__ __forceinline__ void add(float (&d)[128], SharedMatrix a, SharedMatrix b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      COBRA_WGMMA("bf16", d, a, b);
    } else {
      static_assert(std::is_same_v<T, __half>);
      COBRA_WGMMA("f16", d, a, b);
    }
  }
  __device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  // Until at most the last kPending groups are under way.
  template <int kPending>
  __device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  }
  // Before the first product of a group: orders what this thread wrote to d, and keeps the compiler from moving d.
  __device__ __forceinline__ void fence(float (&d)[128]) {
#pragma unroll
    for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
#endif
};
#endif

// Makes this thread's finished writes to shared memory visible to products; then a barrier, before other threads' products.
__device__ __forceinline__ void fence_for_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace cobra

// Elements of CUDA tensors: each in its own dtype in memory, fp32 in registers. A dtype that is only known at run time costs
// one branch per call, the same for every thread, so it needs no template.
#pragma once
#include "common/dtype.h"
#include "common/launch.h"

namespace cobra {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T> __device__ __forceinline__ T round_to(float v);
template <> __device__ __forceinline__ float round_to<float>(float v) { return v; }
template <> __device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ __half round_to<__half>(float v) { return __float2half_rn(v); }

// f(T{}) with the C++ type of a float dtype: in a kernel, and to pick a kernel.
template <class F>
__device__ __forceinline__ void with_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(__nv_bfloat16{});
    case DType::kFloat16: return f(__half{});
    default: return f(float{});
  }
}
template <class F>
inline int pick_by_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(__nv_bfloat16{});
    case DType::kFloat16: return f(__half{});
    default: return f(float{});
  }
}

__device__ __forceinline__ float load_float(const void* base, DType dtype, int64_t offset) {
  float v;
  with_float_type(dtype, [&](auto t) { v = to_float(static_cast<const decltype(t)*>(base)[offset]); });
  return v;
}
__device__ __forceinline__ void store_float(void* base, DType dtype, int64_t offset, float v) {
  with_float_type(dtype, [=](auto t) { static_cast<decltype(t)*>(base)[offset] = round_to<decltype(t)>(v); });
}

// kCount neighbours as they lie in memory, in pieces of at most 16 bytes; aligned to the piece.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T v[kCount];
};
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* p) {
  Pack<T, kCount> pack;
  constexpr int kBytes = sizeof(T) * kCount;
  if constexpr (kBytes % 16 == 0) {
    uint4 raw[kBytes / 16];
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) raw[i] = reinterpret_cast<const uint4*>(p)[i];
    memcpy(&pack, raw, kBytes);
  } else {
    static_assert(kBytes == 8);
    const uint2 raw = *reinterpret_cast<const uint2*>(p);
    memcpy(&pack, &raw, kBytes);
  }
  return pack;
}
template <class T, int kCount>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kCount>& pack) {
  constexpr int kBytes = sizeof(T) * kCount;
  if constexpr (kBytes % 16 == 0) {
    uint4 raw[kBytes / 16];
    memcpy(raw, &pack, kBytes);
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) reinterpret_cast<uint4*>(p)[i] = raw[i];
  } else {
    static_assert(kBytes == 8);
    uint2 raw;
    memcpy(&raw, &pack, kBytes);
    *reinterpret_cast<uint2*>(p) = raw;
  }
}

}  // namespace cobra

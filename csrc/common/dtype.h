// Element types of the tensors a kernel reads and writes. Values are part of the params structs and of the host module.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cobra {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kInt32 = 4, kInt64 = 5 };

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kFloat64:
    case DType::kInt64: return 8;
    default: return 4;
  }
}

// Storage-only 16-bit floats of the CPU kernels: bits in memory, fp32 in registers (vec.h converts).
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

}  // namespace cobra

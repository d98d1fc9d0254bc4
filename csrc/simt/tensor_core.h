// Matrix instructions of a warp, each one collective.
#pragma once
#include "simt/warp.h"

namespace simt {

struct MmaTf32Operands {  // one lane's registers
  float a[4], b[2], c[4];
};

// D = A B + C of m16n8k8, rows of A and columns of B. Lane 4g + t holds A (g, t), (g+8, t), (g, t+4), (g+8, t+4); B (t, g),
// (t+4, g); C and D (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). tf32 ignores the 13 low bits of an operand.
SIMT_RUNTIME inline void exchange_mma_tf32(Thread* lanes, unsigned) {
  const auto tf32 = [](float v) { return double(std::bit_cast<float>(std::bit_cast<uint32_t>(v) & 0xffffe000u)); };
  double A[16][8], B[8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& r = *static_cast<const MmaTf32Operands*>(lanes[lane].in);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][t + i / 2 * 4] = tf32(r.a[i]);
    for (int i = 0; i < 2; ++i) B[t + i * 4][g] = tf32(r.b[i]);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& r = *static_cast<const MmaTf32Operands*>(lanes[lane].in);
    float* const d = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = r.c[i];
      for (int k = 0; k < 8; ++k) sum += A[row][k] * B[k][column];
      d[i] = float(sum);
    }
  }
}

struct MmaHalfOperands {  // one lane's registers, widened: low half of a word first
  float a[8], b[4], c[4];
};

// D = A B + C of m16n8k16. Lane 4g + t holds A (g, 2t), (g, 2t+1), the same of row g+8, then both of columns + 8; B (2t, g), (2t+1, g),
// the same of rows + 8; C and D as above.
SIMT_RUNTIME inline void exchange_mma_half(Thread* lanes, unsigned) {
  float A[16][16], B[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& r = *static_cast<const MmaHalfOperands*>(lanes[lane].in);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) A[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = r.a[i];
    for (int i = 0; i < 4; ++i) B[2 * t + i % 2 + i / 2 * 8][g] = r.b[i];
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& r = *static_cast<const MmaHalfOperands*>(lanes[lane].in);
    float* const d = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = r.c[i];
      for (int k = 0; k < 16; ++k) sum += double(A[row][k]) * B[k][column];
      d[i] = float(sum);
    }
  }
}

}  // namespace simt

// Launcher of the emulator's own test kernels (probe.cu).
#pragma once
#include <cstdint>

namespace cobra {

struct ProbeParams {
  int kernel, blocks, count, what;
  bool by_block_index, forget_flag;
  const float* in;    // (count,)
  int* out;
  int* maximum;       // one, 0 at first
  unsigned* ticket;   // one, 0 at first
  unsigned* flags;    // (blocks,), 0 at first
};

int probe_cuda(const ProbeParams&, void* stream);

}  // namespace cobra

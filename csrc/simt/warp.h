// Warp collectives. Lanes meet by mask: a collective completes when every lane of its mask that has not left the kernel
// called it with that same mask, as on a GPU. Shuffles and votes order no memory; only __syncwarp does.
#pragma once
#include "simt/scheduler.h"

namespace simt {

SIMT_RUNTIME inline void exchange_nothing(Thread*, unsigned) {}  // __syncwarp

// Returns the token of the meeting, for __syncwarp.
SIMT_RUNTIME inline char* meet(unsigned mask, Exchange exchange, const void* in, void* out, int source) {
  Thread& me = *current;
  Warp& warp = me.block->warps[me.linear / kWarpSize];
  const unsigned lane = unsigned(me.linear) % kWarpSize;
  if (!(mask >> lane & 1)) fail("warp collective: lane %u is not in its own mask 0x%08x", lane, mask);
  me.in = in;
  me.out = out;
  me.source = source;
  Meeting* meeting = nullptr;
  for (Meeting& m : warp.meetings)
    if (m.arrived && m.mask == mask) meeting = &m;
  if (!meeting) {
    for (Meeting& m : warp.meetings)
      if (!m.arrived) meeting = &m;
    meeting->mask = mask;
    meeting->exchange = exchange;
  }
  if (meeting->exchange != exchange) fail("lanes of mask 0x%08x are in different warp collectives", mask);
  meeting->arrived |= 1u << lane;
  char* const token = &meeting->token[meeting->phase];
  if (exchange == &exchange_nothing) release(token);
  if (meeting->arrived == (mask & ~warp.exited)) complete(me, *meeting);
  wait();
  return token;
}

// Each lane gets the value of lane `source`; from a lane that is not there it gets NaN.
template <size_t kBytes>
SIMT_RUNTIME inline void exchange_shuffle(Thread* lanes, unsigned mask) {
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) {
      const int source = lanes[lane].source;
      if (mask >> source & 1)
        __builtin_memcpy(lanes[lane].out, lanes[source].in, kBytes);
      else
        __builtin_memset(lanes[lane].out, 0xff, kBytes);
    }
}

SIMT_RUNTIME inline void exchange_ballot(Thread* lanes, unsigned mask) {
  unsigned votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) votes |= unsigned(*static_cast<const int*>(lanes[lane].in) != 0) << lane;
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) *static_cast<unsigned*>(lanes[lane].out) = votes;
}

template <class T>
SIMT_RUNTIME inline T shuffle(unsigned mask, T value, int source) {
  T result;
  meet(mask, &exchange_shuffle<sizeof(T)>, &value, &result, source);
  return result;
}

SIMT_RUNTIME inline int lane() { return current->linear % kWarpSize; }

}  // namespace simt

// `width` (a power of two) cuts the warp into pieces that shuffle among themselves.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle(mask, value, (simt::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::lane(), source = lane - int(delta);
  return simt::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::lane(), source = lane + int(delta);
  return simt::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const int lane = simt::lane(), source = lane ^ flip;
  return simt::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}

SIMT_RUNTIME inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes;
  simt::meet(mask, &simt::exchange_ballot, &predicate, &votes, 0);
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

SIMT_RUNTIME inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::acquire(simt::meet(mask, &simt::exchange_nothing, nullptr, nullptr, 0));
}

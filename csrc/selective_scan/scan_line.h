// The line schedule: chains of steps that must run in order, cut into equal shares, so that every worker has the same work
// although there are few more chains than workers (McNaughton, 1959).
//
// The chains lie end to end on a line, and worker w owns [w, w + 1) * total / workers of it. At each end of its share a chain may
// be cut: the worker runs the first part of the chain at its right end first, the whole chains next, and the last part of the chain
// at its left end last. That last part needs the state that the worker before left after its first item. Shares are at least as
// long as a chain, so a chain has one cut at most and its two parts never overlap in time when all workers start together.
#pragma once
#include <cstdint>

#include "common/rows.h"

namespace cobra {

struct LineItem {
  int64_t chain, begin, end;  // steps of the chain
  bool receives, sends;       // the state before `begin` from the worker before, the state at `end` to the next one
};

// Int holds chains * steps and the square of workers.
template <class Int>
struct BasicLine {
  Int chains, steps, workers;  // 1 <= workers <= chains, steps >= 1

  COBRA_HOST_DEVICE Int share_begin(Int worker) const {
    const Int total = chains * steps;  // total * workers might not fit
    return total / workers * worker + total % workers * worker / workers;
  }

  // Item i of a worker; false after the last one.
  COBRA_HOST_DEVICE bool item(Int worker, Int i, LineItem& item) const {
    const Int begin = share_begin(worker), end = share_begin(worker + 1);
    const Int head = end % steps ? 1 : 0, first_whole = (begin + steps - 1) / steps, wholes = end / steps - first_whole;
    if (i < head)
      item = {end / steps, 0, end % steps, false, true};
    else if (i < head + wholes)
      item = {first_whole + i - head, 0, steps, false, false};
    else if (i == head + wholes && begin % steps)
      item = {begin / steps, begin % steps, steps, true, false};
    else
      return false;
    return true;
  }
};
using Line = BasicLine<int64_t>;

}  // namespace cobra

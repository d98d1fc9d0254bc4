// The module itself: its rooms, threads, instruction-set level, and the emulator's options.
#include "host/host.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "common/cpu_level.h"
#include "simt/options.h"

namespace cobra::host {
namespace {

std::vector<void (*)(py::module_&)>& rooms() {
  static std::vector<void (*)(py::module_&)> list;
  return list;
}

std::atomic<int> thread_count{1};

// One range per thread. `grain` is passed over: it keeps small problems on one thread, and tests are small.
void run_threads(int64_t begin, int64_t end, int64_t /*grain*/, Parallel::Body body, void* context) {
  const int64_t count = std::clamp<int64_t>(end - begin, 1, thread_count), each = (end - begin + count - 1) / count;
  std::vector<std::thread> threads;
  for (int64_t first = begin + each; first < end; first += each)
    threads.emplace_back(body, first, std::min(end, first + each), context);
  body(begin, std::min(end, begin + each), context);
  for (std::thread& thread : threads) thread.join();
}

constexpr const char* kLevels[] = {"scalar", "avx2", "avx512"};

bool set_level(const std::string& name) {
  for (int level = 0; level < 3; ++level)
    if (name == kLevels[level]) return set_cpu_level(CpuLevel(level));
  throw std::invalid_argument("level is \"" + name + "\", expected \"scalar\", \"avx2\" or \"avx512\"");
}

void set_simt(const std::string& order, uint64_t seed, int64_t resident, int64_t step_limit, int64_t max_grid_x) {
  simt::Options options{.seed = seed, .resident = resident, .step_limit = step_limit, .max_grid_x = max_grid_x};
  if (order == "reverse")
    options.order = simt::Order::kReverse;
  else if (order == "random")
    options.order = simt::Order::kRandom;
  else if (order != "forward")
    throw std::invalid_argument("order is \"" + order + "\", expected \"forward\", \"reverse\" or \"random\"");
  simt::options() = options;
}

}  // namespace

Room::Room(void (*add)(py::module_&)) { rooms().push_back(add); }

Parallel parallel() { return {thread_count > 1 ? &run_threads : &run_serial}; }

DType dtype_of(const py::array& array, const char* name) {
  const py::dtype dtype = array.dtype();
  if (dtype.equal(py::dtype("float32"))) return DType::kFloat32;
  if (dtype.equal(py::dtype("uint16"))) return DType::kBFloat16;
  if (dtype.equal(py::dtype("float16"))) return DType::kFloat16;
  if (dtype.equal(py::dtype("float64"))) return DType::kFloat64;
  if (dtype.equal(py::dtype("int32"))) return DType::kInt32;
  if (dtype.equal(py::dtype("int64"))) return DType::kInt64;
  throw std::invalid_argument(std::string(name) + " has dtype " + std::string(py::str(dtype)) +
                              ", expected float32, uint16 (bf16), float16, float64, int32 or int64");
}

int64_t stride_of(const py::array& array, py::ssize_t axis, const char* name) {
  const int64_t bytes = array.strides(axis), item = array.itemsize();
  if (bytes % item) throw std::invalid_argument(std::string(name) + " has a stride of " + std::to_string(bytes) + " bytes, no multiple of its element");
  return bytes / item;
}

Rows::Rows(const py::array& like) : dim_(like.ndim() ? like.shape(like.ndim() - 1) : 0) {
  if (like.ndim() < 1 || like.ndim() > kMaxRowDims + 1) throw std::invalid_argument("expected 1 to " + std::to_string(kMaxRowDims + 1) + " dims");
  shape_.ndim = std::max<int32_t>(1, int32_t(like.ndim()) - 1);
  shape_.size[0] = 1;  // of a vector: one row
  for (py::ssize_t axis = 0; axis + 1 < like.ndim(); ++axis) shape_.size[axis] = like.shape(axis);
}

void Rows::add(const py::array& array, RowStride& stride, const char* name) const {
  const py::ssize_t leading = array.ndim() - 1;
  bool same = leading >= 0 && array.shape(leading) == dim_ && (leading == shape_.ndim || (leading == 0 && count() == 1));
  for (py::ssize_t axis = 0; same && axis < leading; ++axis) same = array.shape(axis) == shape_.size[axis];
  if (!same) throw std::invalid_argument(std::string(name) + " has another shape");
  stride.row[0] = 0;
  for (py::ssize_t axis = 0; axis < leading; ++axis) stride.row[axis] = stride_of(array, axis, name);
  stride.dim = stride_of(array, leading, name);
}

int64_t Rows::count() const {
  int64_t rows = 1;
  for (int i = 0; i < shape_.ndim; ++i) rows *= shape_.size[i];
  return rows;
}

PYBIND11_MODULE(cobra_kernels_host, m) {
  m.doc() = "CPU kernels and emulated CUDA kernels on numpy arrays; bf16 as uint16.";
  py::register_exception<simt::Failure>(m, "SimtFailure", PyExc_RuntimeError);
  m.def("set_threads", [](int count) { thread_count = std::max(1, count); }, py::arg("count"), "std::threads of a CPU kernel");
  m.def("set_cpu_level", &set_level, py::arg("level"), "false if this processor lacks the level");
  m.def("cpu_level", [] { return kLevels[int(cpu_level())]; });
  const simt::Options defaults;
  m.def("set_simt", &set_simt, py::arg("order") = "forward", py::arg("seed") = defaults.seed, py::arg("resident") = defaults.resident,
        py::arg("step_limit") = defaults.step_limit, py::arg("max_grid_x") = defaults.max_grid_x,
        "How this thread's next emulated launches run (csrc/simt/options.h); what is not given returns to its default");
  for (const auto add : rooms()) add(m);
}

}  // namespace cobra::host

// The emulator's own test kernels (simt/probe.cu) on numpy arrays.
#include "host/host.h"
#include "simt/probe.h"

namespace cobra::host {
namespace {

const Room room([](py::module_& m) {
  m.def(
      "probe",
      [](int kernel, int blocks, const py::array_t<float>& in, const py::array_t<int32_t>& out, const py::array_t<int32_t>& maximum,
         const py::array_t<uint32_t>& ticket, const py::array_t<uint32_t>& flags, int what, bool by_block_index, bool forget_flag) {
        ProbeParams p{};
        p.kernel = kernel;
        p.blocks = blocks;
        p.count = int(in.size());
        p.what = what;
        p.by_block_index = by_block_index;
        p.forget_flag = forget_flag;
        p.in = in.data();
        p.out = static_cast<int*>(pointer(out));
        p.maximum = static_cast<int*>(pointer(maximum));
        p.ticket = static_cast<unsigned*>(pointer(ticket));
        p.flags = static_cast<unsigned*>(pointer(flags));
        const py::gil_scoped_release unlocked;
        return probe_cuda(p, nullptr);
      },
      py::arg("kernel"), py::arg("blocks"), py::arg("in"), py::arg("out"), py::arg("maximum"), py::arg("ticket"), py::arg("flags"),
      py::arg("what") = 0, py::arg("by_block_index") = false, py::arg("forget_flag") = false);
});

}  // namespace
}  // namespace cobra::host

// fastlm._C: what is known of the kernels without a GPU. The operators are in libfastlm_cuda.so.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <string>

namespace {

struct Kernel {
  const char* name;
  const char* target;
  int registers, spills, shared;
};

#include "build_facts.inc"

struct Multiprocessor {
  int threads, blocks, registers, shared, reserved_shared;
};

const std::map<std::string, Multiprocessor> kMultiprocessors = {
    {"sm_80", {2048, 32, 65536, 164 * 1024, 1024}},
    {"sm_90a", {2048, 32, 65536, 228 * 1024, 1024}},
};

constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

const Kernel& find(const std::string& kernel, const std::string& target) {
  for (const Kernel& each : kKernels) {
    if (kernel == each.name && target == each.target) return each;
  }
  throw pybind11::value_error("occupancy: kernel must be one of kernels() for " + target +
                              ", got " + kernel);
}

// Blocks of a kernel that a multiprocessor holds at a time: the least that threads, registers
// (given to warps by 256) and shared memory (to blocks by 128, with a reserve) allow.
int occupancy(const std::string& kernel, int threads, int shared, const std::string& target) {
  if (threads < 1 || threads > 1024) {
    throw pybind11::value_error("occupancy: threads must be from 1 to 1024, got " +
                                std::to_string(threads));
  }
  const Kernel& k = find(kernel, target);
  const Multiprocessor& mp = kMultiprocessors.at(target);
  const int warps = round_up(threads, 32) / 32;
  const int registers = round_up(k.registers * 32, 256) * warps;
  const int bytes = round_up(shared + k.shared + mp.reserved_shared, 128);
  return std::min({mp.blocks, mp.threads / (warps * 32), mp.registers / registers,
                   mp.shared / bytes});
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = kVersion;
  info["nvcc"] = kNvcc;
  info["torch"] = kTorch;
  info["host_compiler"] = "g++ " __VERSION__;
  pybind11::list targets;
  for (const char* target : kTargets) targets.append(target);
  info["targets"] = targets;
  return info;
}

pybind11::list kernels() {
  pybind11::list all;
  for (const Kernel& k : kKernels) {
    pybind11::dict row;
    row["kernel"] = k.name;
    row["target"] = k.target;
    row["registers"] = k.registers;
    row["spills"] = k.spills;
    row["shared"] = k.shared;
    all.append(row);
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the CUDA C++ kernels that were built with this package.";
  m.def("build_info", &build_info, "Versions of what built the library, and its targets.");
  m.def("kernels", &kernels,
        "Of each kernel and target: registers of a thread, bytes spilled, bytes of static shared "
        "memory.");
  m.def("occupancy", &occupancy, pybind11::arg("kernel"), pybind11::arg("threads"),
        pybind11::arg("shared"), pybind11::arg("target"),
        "Blocks of `threads` threads and `shared` bytes of dynamic shared memory that a "
        "multiprocessor holds at a time.");
}

// fastlm._C: what is known of the kernels without a GPU. The operators are in libfastlm_cuda.so.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>

namespace {

struct Kernel {
  const char* name;
  const char* target;
  int registers, spills, threads;
  int shared;  // -1: all that a block may have
};

#include "build_facts.inc"

struct Multiprocessor {
  int threads, blocks, registers, shared, reserved_shared;
};

const std::map<std::string, Multiprocessor> kMultiprocessors = {
    {"sm_80", {2048, 32, 65536, 164 * 1024, 1024}},
    {"sm_90a", {2048, 32, 65536, 228 * 1024, 1024}},
};

int most_shared(const Multiprocessor& mp) { return mp.shared - mp.reserved_shared; }

int most_shared(const Kernel& k) {
  return k.shared < 0 ? most_shared(kMultiprocessors.at(k.target)) : k.shared;
}

constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

const Kernel& find(const std::string& kernel, const std::string& target) {
  for (const Kernel& each : kKernels) {
    if (kernel == each.name && target == each.target) return each;
  }
  throw pybind11::value_error("occupancy: kernel must be one of kernels() for " + target +
                              ", got " + kernel);
}

void check(const char* name, int value, int least, int most) {
  if (value >= least && value <= most) return;
  throw pybind11::value_error("occupancy: " + std::string(name) + " must be from " +
                              std::to_string(least) + " to " + std::to_string(most) + ", got " +
                              std::to_string(value));
}

// Blocks of a kernel that a multiprocessor holds at a time: the least that threads, registers
// (given to warps by 256, of each quarter of a multiprocessor to a quarter of a block's warps) and
// shared memory (to blocks by 128, with a reserve) allow.
int blocks(const Kernel& k, int threads, int shared) {
  const Multiprocessor& mp = kMultiprocessors.at(k.target);
  const int warps = round_up(threads, 32) / 32;
  const int quarter = mp.registers / 4 / round_up(k.registers * 32, 256);  // warps
  const int bytes = round_up(shared + mp.reserved_shared, 128);
  return std::min({mp.blocks, mp.threads / (warps * 32), quarter / (round_up(warps, 4) / 4),
                   mp.shared / bytes});
}

int occupancy(const std::string& kernel, const std::string& target, std::optional<int> threads,
              std::optional<int> shared) {
  const Kernel& k = find(kernel, target);
  if (threads) check("threads", *threads, 1, 1024);
  if (shared) check("shared", *shared, 0, most_shared(kMultiprocessors.at(target)));
  return blocks(k, threads.value_or(k.threads), shared.value_or(most_shared(k)));
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
    row["threads"] = k.threads;
    row["shared"] = most_shared(k);
    row["occupancy"] = blocks(k, k.threads, most_shared(k));
    all.append(row);
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the CUDA C++ kernels that were built with this package.";
  m.def("build_info", &build_info, "Versions of what built the library, and its targets.");
  m.def("kernels", &kernels,
        "Of each kernel and target: registers of a thread, bytes spilled, the most threads and "
        "bytes of shared memory that a launch asks for a block, and its occupancy with these.");
  m.def("occupancy", &occupancy, pybind11::arg("kernel"), pybind11::arg("target"),
        pybind11::arg("threads") = pybind11::none(), pybind11::arg("shared") = pybind11::none(),
        "Blocks of `threads` threads and `shared` bytes of shared memory, those of kernels() by "
        "default, that a multiprocessor holds at a time.");
}

// What the sources have of each other.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <unistd.h>

#include <cxxabi.h>
#include <optional>

// Runs what may come for Python's lock. Before 3.14 an interpreter that ends takes a thread that comes for it away, by
// `pthread_exit`: on its way out through C++ that would touch objects of Python's without the lock, and end the process
// where nothing may be thrown. Such a thread stays here, as from 3.14 on it does in Python.
template <class Run>
decltype(auto) staying(const Run& run) {
#ifdef __GLIBCXX__
  try {
    return run();
  } catch (const abi::__forced_unwind&) {
    for (;;) pause();
  }
#else
  return run();
#endif
}

// Of numbers, four at a time, which do not wait for each other.
inline size_t hashed(const int64_t* parts, size_t count) {
  uint64_t lanes[4] = {1469598103934665603ull, 1099511628211ull, 14029467366897019727ull, 1609587929392839161ull};
  for (size_t i = 0; i < count; ++i) {
    uint64_t& lane = lanes[i & 3];
    lane = (lane ^ static_cast<uint64_t>(parts[i])) * 11400714785074694791ull;
    lane ^= lane >> 29;
  }
  uint64_t hash = 0;
  for (const uint64_t lane : lanes) hash = (hash ^ lane) * 11400714785074694791ull;
  return hash ^ hash >> 31;
}

// Holds Python's lock.
struct Gil {
  PyGILState_STATE state = staying([] { return PyGILState_Ensure(); });
  ~Gil() {
    staying([this] { PyGILState_Release(state); });
  }
};

// Has PyTorch's warnings, and says nothing.
struct Silent : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Is it nothing but its memory, on a device of this kind: of no subclass, no transform, no lazy negation?
bool ordinary(const at::Tensor& tensor, c10::DeviceType kind);

// The kind of device whose calls are served: the GPU, or the CPU, as tests have it.
c10::DeviceType served_kind();

// The driver's handle of the current stream of this device; none of the CPU's.
void* stream_of(c10::Device device);

// Is a graph of the GPU's being captured, on the current stream of this device?
bool captured(c10::Device device);

// Ops of our own, beside PyTorch's.
void define_sums(torch::Library& library);
void define_additions(torch::Library& library);

// Turns it on for the GPU, or for the CPU, as tests do, or off.
void casts_on(bool on, bool cpu);
void layouts_on(bool on, bool cpu);

// A weight in autocast's dtype: its cast of this region, which all that use it share.
at::Tensor casted(at::ScalarType dtype, const at::Tensor& weight, c10::DeviceType device);

// Somebody has a tensor's memory by a way that its version does not tell of: nothing that was made of it is of use.
void touched(const at::Tensor& tensor);

// Has `touched` told of all who ask a tensor for its `data`. False where that cannot be met. Under the GIL.
bool aliases_met();

// Gradients of fp32 weights whose casts were used. a b in this dtype: where the GPU's products can, sums that are rounded to
// it and to nothing else. The sums of columns, which a kernel of ours may serve. What a gradient goes to: the weight itself
// where autograd knows its cast, else the cast.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, bool recorded);
at::Tensor column_sum(const at::Tensor& rows, at::ScalarType dtype);
const at::Tensor& target(const at::Tensor& weight, const at::Tensor& cast);

// act(x W1ᵀ + b1) W2ᵀ + b2 by the calls of PyTorch's three functions, with one node of autograd where gradients are wanted.
enum class Activation : int64_t { gelu, gelu_tanh, relu };
at::Tensor mlp(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& b1, const at::Tensor& w2,
               const at::Tensor& b2, Activation activation);

// A mask or bias (B, H, Sq, Sk), with one row of the first three axes each where all along it are one in memory.
at::Tensor differing(const at::Tensor& mask);

// Attention of (B, H, S, D) under a bias that learns: would PyTorch's own call run its memory-efficient kernels here and now,
// which then do so by one node of autograd? Rows that see nothing are 0, and so are their gradients.
bool efficient(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias,
               std::optional<double> scale);
at::Tensor learned(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias,
                   std::optional<double> scale);

// Is there a note on what this mask shows, an object of Python's, and is a call with it large enough to look at it? Under
// the GIL.
bool noted(PyObject* mask, const at::Tensor& q, const at::Tensor& k);

// Attention of (B, H, S, D) by the note on its mask; undefined where the mask itself is to serve.
at::Tensor by_note(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
                   std::optional<double> scale, bool grouped);
void notes_on(bool now);

// Functions of the module: the gates', what makes keys of calls, and what is told of notes.
extern PyMethodDef gate_methods[];
extern PyMethodDef key_methods[];
extern PyMethodDef note_methods[];

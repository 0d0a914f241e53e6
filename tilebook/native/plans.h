// A recorded call: what is allocated and launched for it, and what comes out. As `plans.py` has it.

#pragma once

#include "shared.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <vector>

namespace served {

constexpr int kNoTensor = -1;
constexpr int kNumber = -2;  // of an output that is no tensor
constexpr int kTheirs = -3;  // of an output of PyTorch's own kernel

// A tensor map, by which the hardware copies tiles: a CUtensorMap, of which only the address changes from call to call.
struct alignas(64) Map {
  unsigned char bytes[128];
};

struct Made {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

struct Parameter {
  int slot;  // the tensor whose address it is or has, or kNoTensor
  int map;  // which of the launch's maps it is, or kNoTensor
  uint64_t number;  // its bytes, if it is neither
};

struct Launch {
  void* function;
  unsigned grid[3], threads, shared;
  std::vector<Parameter> parameters;
  std::vector<Map> maps;
};

struct Output {
  int slot;  // or kNoTensor, kNumber or kTheirs
  int64_t number;
};

// What of a call is left to PyTorch's own kernel, which has these flags in the place of one of its arguments.
struct Rest {
  int place = kNoTensor;
  c10::List<bool> flags;
};

struct Plan {
  std::vector<Made> made;
  std::vector<Launch> launches;
  std::vector<Output> outputs;
  std::vector<int> copied;  // arguments that are made contiguous first; the others are taken as they lie
  Rest rest;
};

enum class Outcome { done, not_now, never };

// Allocates and launches what was recorded; puts the outputs in the place of the arguments. Else the arguments are what
// they were but for their strides.
Outcome repeated(const c10::OperatorHandle& op, c10::DispatchKeySet below, const Plan& plan, torch::jit::Stack* stack,
                 size_t count);

// A plan of an op, as Python has it: ([(sizes, strides, dtype)], [(function, (x, y, z), threads, shared, [parameter])],
// [(output slot, number)], [copied argument], rest). False where there is an exception.
bool parsed(PyObject* given, const c10::FunctionSchema& schema, Plan& plan);

// Can launches be started here? For tests: they are, and maps are changed, by functions at these addresses; 0 for none.
bool driver_found();
void pretend_driver(uint64_t launch, uint64_t replace);

// Owns one reference.
struct Object {
  PyObject* held;
  explicit Object(PyObject* given) : held(given) {}
  Object(const Object&) = delete;
  ~Object() { Py_XDECREF(held); }
  operator PyObject*() const { return held; }
};

}  // namespace served

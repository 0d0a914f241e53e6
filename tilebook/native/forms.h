// Public functions of ours: what of them may be PyTorch's, and how that is called.

#pragma once

#include "shared.h"

#include <array>
#include <optional>
#include <utility>

namespace gating {

constexpr int kMostArguments = 16;
constexpr int kMostTensors = 7;

// The arguments of a call as one of the forms takes them; tensors that are None are undefined. Each is held once
// more while Python's lock is: who copies a tensor that an object of Python's alone holds, takes the lock for it.
struct Call {
  PyObject* const* given;
  std::array<PyObject*, kMostTensors> objects;
  std::array<at::Tensor, kMostTensors> tensors;
  const at::Tensor& operator[](int index) const { return tensors[index]; }
  int count = 0;  // of tensors and of what is None in a tensor's place
  int64_t told = 0;  // options that tell kinds apart
  std::optional<double> scale;
  double number = 0;
  int64_t index = 0;
  bool recorded = false;
  explicit Call(PyObject* const* given) : given(given) {}
};

// A public function: the names of its arguments; what of it may be PyTorch's, and how that is called.
struct Form {
  const char* name;
  const char* arguments;
  bool (*takes)(Call&);
  std::pair<at::Tensor, at::Tensor> (*plain)(const Call&);
};

struct Forms {
  const Form *first, *last;
  const Form* begin() const { return first; }
  const Form* end() const { return last; }
};

Forms forms();

extern PyTypeObject* parameter_type;  // torch.nn.Parameter

}  // namespace gating

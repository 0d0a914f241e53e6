// Recorded calls: how they are read, and repeated.

#include "plans.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>

#include <dlfcn.h>

#include <atomic>
#include <cstring>

namespace served {
namespace {

using c10::DispatchKeySet;
using torch::jit::Stack;

// The signature of cuLaunchKernel.
using Launcher = int (*)(
    void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);

// The signature of cuTensorMapReplaceAddress.
using Replacer = int (*)(Map*, void*);

constexpr size_t kMostTensors = 24;
constexpr size_t kMostParameters = 160;
constexpr size_t kMostMaps = 8;

std::atomic<Launcher> launcher{nullptr};
std::atomic<Replacer> replacer{nullptr};

// Of the driver, to give a thread a context that has none: PyTorch may have had no reason to.
int (*context_of_thread)(void**) = nullptr;
int (*set_context)(void*) = nullptr;
int (*retain_context)(void**, int) = nullptr;
int (*device_of)(int*, int) = nullptr;

// What a launch returns where another one may work: no context, or a graph that is being captured.
bool passing(int status) { return status == 2 || status == 201 || (status >= 900 && status <= 908); }

void give_context(c10::Device device) {
  void* current = nullptr;
  int number = 0;
  if (!context_of_thread || device.is_cpu() || (context_of_thread(&current) == 0 && current)) return;
  if (device_of(&number, device.index()) == 0 && retain_context(&current, number) == 0) set_context(current);
}

bool numbers(PyObject* given, std::vector<int64_t>& into) {
  const Object items(PySequence_Fast(given, "expected numbers"));
  if (!items) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.held); ++i) {
    into.push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.held, i)));
  }
  return !PyErr_Occurred();
}

// (slot, number or the bytes of a map) → a parameter of the launch.
bool parsed(PyObject* given, int slots, Launch& launch) {
  Parameter each{kNoTensor, kNoTensor, 0};
  PyObject* value;
  if (!PyArg_ParseTuple(given, "iO", &each.slot, &value)) return false;
  const bool map = PyBytes_Check(value);
  if (each.slot < (map ? 0 : kNoTensor) || each.slot >= slots) {
    PyErr_Format(PyExc_ValueError, "there is no slot %d", each.slot);
    return false;
  }
  if (map) {
    Map bytes;
    if (PyBytes_GET_SIZE(value) != sizeof(bytes) || launch.maps.size() == kMostMaps || !replacer.load()) {
      PyErr_SetString(PyExc_ValueError, "no such maps can be made here");
      return false;
    }
    memcpy(&bytes, PyBytes_AS_STRING(value), sizeof(bytes));
    each.map = static_cast<int>(launch.maps.size());
    launch.maps.push_back(bytes);
  } else {
    each.number = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred()) return false;
  }
  launch.parameters.push_back(each);
  return true;
}

// None or (argument, flags in its place) → what is left to PyTorch's kernel.
bool parsed(PyObject* given, size_t count, Rest& rest) {
  if (given == Py_None) return true;
  PyObject* flags;
  if (!PyArg_ParseTuple(given, "iO!", &rest.place, &PyTuple_Type, &flags)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(flags); ++i) rest.flags.push_back(PyTuple_GET_ITEM(flags, i) == Py_True);
  if (rest.place >= 0 && rest.place < static_cast<int>(count)) return true;
  PyErr_SetString(PyExc_ValueError, "there is no such argument");
  return false;
}

}  // namespace

Outcome repeated(const c10::OperatorHandle& op, DispatchKeySet below, const Plan& plan, Stack* stack, size_t count) {
  const size_t first = stack->size() - count;
  at::Tensor made[kMostTensors];
  c10::Device device = c10::kCPU;
  for (size_t i = 0; i < count; ++i) {
    const auto& arg = (*stack)[first + i];
    if (arg.isTensor() && arg.toTensor().defined()) {
      device = arg.toTensor().device();
      break;
    }
  }
  const c10::DeviceGuard guard(device);
  try {
    for (const int each : plan.copied) {
      auto& arg = (*stack)[first + each];
      arg = arg.toTensor().contiguous();
    }
    for (size_t i = 0; i < plan.made.size(); ++i) {
      const auto& each = plan.made[i];
      made[i] = at::empty_strided(each.sizes, each.strides, at::TensorOptions().dtype(each.dtype).device(device));
    }
  } catch (const c10::Error&) {
    return Outcome::not_now;  // no memory: PyTorch's kernel may need less, or says so itself
  }
  const auto address = [&](int slot) -> uint64_t {
    const auto& tensor = slot < static_cast<int>(count) ? (*stack)[first + slot].toTensor() : made[slot - count];
    return reinterpret_cast<uint64_t>(tensor.const_data_ptr());
  };
  give_context(device);
  void* stream = stream_of(device);
  const auto start = launcher.load(std::memory_order_relaxed);
  for (const auto& launch : plan.launches) {
    uint64_t values[kMostParameters];
    void* parameters[kMostParameters];
    Map maps[kMostMaps];
    for (size_t i = 0; i < launch.parameters.size(); ++i) {
      const auto& each = launch.parameters[i];
      values[i] = each.slot == kNoTensor ? each.number : address(each.slot);
      parameters[i] = &values[i];
      if (each.map == kNoTensor) continue;
      maps[each.map] = launch.maps[each.map];
      parameters[i] = &maps[each.map];
      if (replacer.load(std::memory_order_relaxed)(&maps[each.map], reinterpret_cast<void*>(values[i])) != 0) {
        return Outcome::never;
      }
    }
    const int status = start(launch.function, launch.grid[0], launch.grid[1], launch.grid[2], launch.threads, 1, 1,
                             launch.shared, stream, parameters, nullptr);
    if (status != 0) return passing(status) ? Outcome::not_now : Outcome::never;
  }
  Stack theirs;
  if (plan.rest.place != kNoTensor) {
    theirs.assign(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
    theirs[plan.rest.place] = c10::IValue(plan.rest.flags.copy());
    op.redispatchBoxed(below, &theirs);
  }
  torch::jit::drop(*stack, count);
  for (const auto& each : plan.outputs) {
    if (each.slot == kNumber) {
      stack->emplace_back(each.number);
    } else if (each.slot == kTheirs) {
      stack->push_back(std::move(theirs[each.number]));
    } else {
      stack->emplace_back(each.slot == kNoTensor ? at::Tensor() : made[each.slot - count]);
    }
  }
  return Outcome::done;
}

bool parsed(PyObject* given, const c10::FunctionSchema& schema, Plan& plan) {
  const size_t count = schema.arguments().size();
  PyObject *made, *launches, *outputs, *copied, *rest = Py_None;
  if (!PyArg_ParseTuple(given, "O!O!O!O!|O", &PyList_Type, &made, &PyList_Type, &launches, &PyList_Type, &outputs,
                        &PyList_Type, &copied, &rest)) {
    return false;
  }
  if (!parsed(rest, count, plan.rest)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(made); ++i) {
    PyObject *sizes, *strides;
    int dtype;
    Made each;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(made, i), "OOi", &sizes, &strides, &dtype)) return false;
    if (!numbers(sizes, each.sizes) || !numbers(strides, each.strides)) return false;
    each.dtype = static_cast<at::ScalarType>(dtype);
    plan.made.push_back(std::move(each));
  }
  const int slots = static_cast<int>(count + plan.made.size());
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(launches); ++i) {
    Launch launch;
    unsigned long long function;
    PyObject* parameters;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(launches, i), "K(III)IIO!", &function, &launch.grid[0], &launch.grid[1],
                          &launch.grid[2], &launch.threads, &launch.shared, &PyList_Type, &parameters)) {
      return false;
    }
    launch.function = reinterpret_cast<void*>(function);
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(parameters); ++j) {
      if (!parsed(PyList_GET_ITEM(parameters, j), slots, launch)) return false;
    }
    plan.launches.push_back(std::move(launch));
    if (plan.launches.back().parameters.size() > kMostParameters) {
      PyErr_SetString(PyExc_ValueError, "too many parameters");
      return false;
    }
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(outputs); ++i) {
    Output each;
    long long number;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(outputs, i), "iL", &each.slot, &number)) return false;
    each.number = number;
    bool known = each.slot == kNoTensor || each.slot == kNumber;
    if (each.slot == kTheirs) {
      known = plan.rest.place != kNoTensor && number >= 0 && number < static_cast<long long>(schema.returns().size());
    }
    if (!known && (each.slot < static_cast<int>(count) || each.slot >= slots)) {
      PyErr_Format(PyExc_ValueError, "there is no output in slot %d", each.slot);
      return false;
    }
    plan.outputs.push_back(each);
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(copied); ++i) {
    const long each = PyLong_AsLong(PyList_GET_ITEM(copied, i));
    if (PyErr_Occurred() || each < 0 || each >= static_cast<long>(count)) {
      PyErr_SetString(PyExc_ValueError, "there is no such argument");
      return false;
    }
    plan.copied.push_back(static_cast<int>(each));
  }
  if (plan.made.size() > kMostTensors) {
    PyErr_SetString(PyExc_ValueError, "too many tensors");
    return false;
  }
  return true;
}

bool driver_found() {
  if (!launcher.load()) {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (driver) {
      context_of_thread = reinterpret_cast<int (*)(void**)>(dlsym(driver, "cuCtxGetCurrent"));
      set_context = reinterpret_cast<int (*)(void*)>(dlsym(driver, "cuCtxSetCurrent"));
      retain_context = reinterpret_cast<int (*)(void**, int)>(dlsym(driver, "cuDevicePrimaryCtxRetain"));
      device_of = reinterpret_cast<int (*)(int*, int)>(dlsym(driver, "cuDeviceGet"));
      replacer = reinterpret_cast<Replacer>(dlsym(driver, "cuTensorMapReplaceAddress"));
      const bool asked = dlsym(driver, "cuFuncGetParamInfo") != nullptr;  // by plans.py
      if (context_of_thread && set_context && retain_context && device_of && replacer.load() && asked) {
        launcher = reinterpret_cast<Launcher>(dlsym(driver, "cuLaunchKernel"));
      }
    }
  }
  return launcher.load() != nullptr;
}

void pretend_driver(uint64_t launch, uint64_t replace) {
  launcher = reinterpret_cast<Launcher>(launch);
  replacer = reinterpret_cast<Replacer>(replace);
}

}  // namespace served

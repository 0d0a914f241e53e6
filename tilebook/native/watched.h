// Who is to see a call of a public function itself, and each of the calls that it makes.

#pragma once

#include "shared.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace gating {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

PyObject *compiler_names = nullptr, *compiling_name = nullptr;  // of torch.compiler
PyObject* monitored_events = nullptr;  // of sys.monitoring: what any tool asks for of all code

// Begins to look; given torch.compiler. Under the GIL.
void watch(PyObject* compiler) {
  Py_INCREF(PyModule_GetDict(compiler));
  Py_XSETREF(compiler_names, PyModule_GetDict(compiler));
  if (!compiling_name) compiling_name = PyUnicode_InternFromString("_is_compiling_flag");
  PyObject* const monitoring = PySys_GetObject("monitoring");  // borrowed
  if (!monitored_events && monitoring) monitored_events = PyObject_GetAttrString(monitoring, "_all_events");
  if (!monitored_events) PyErr_Clear();
}

// Does a tool of sys.monitoring ask for events of this code? As profiles of Python's and debuggers do from 3.12 on.
bool monitored(const PyCodeObject* code) {
#if PY_VERSION_HEX >= 0x030C0000
  if (code->_co_monitoring) {
    for (const auto tools : code->_co_monitoring->local_monitors.tools) {
      if (tools) return true;
    }
  }
#endif
  if (!monitored_events) return false;
  PyObject* const events = PyObject_CallNoArgs(monitored_events);
  const bool any = !events || !PyDict_Check(events) || PyDict_GET_SIZE(events);
  if (!events) PyErr_Clear();
  Py_XDECREF(events);
  return any;
}

// Does anybody look at Python's frames, or trace what runs?
bool watched(const PyCodeObject* code) {
  const PyThreadState* thread = PyThreadState_Get();
  if (thread->c_tracefunc || thread->c_profilefunc) return true;
  if (monitored(code)) return true;
  if (_PyInterpreterState_GetEvalFrameFunc(PyInterpreterState_Get()) != _PyEval_EvalFrameDefault) return true;
  return PyDict_GetItemWithError(compiler_names, compiling_name) != Py_False;
}

// Is the next call one that no override is to see? Only newer PyTorchs have such a state.
template <class State>
bool skips_next() {
  if constexpr (requires { State::peek_skip_next(); }) return State::peek_skip_next();
  return false;
}

// What a backward pass goes without: names of axes, which only older PyTorchs have.
template <class Keys>
DispatchKeySet without_names() {
  if constexpr (requires { Keys::Named; }) return DispatchKeySet(Keys::Named);
  return {};
}

// Is a mode, a transform, a trace or a profile under way, which is to see the function itself or each of its calls?
bool unusual(const c10::impl::LocalDispatchKeySet& here) {
  static const DispatchKeySet included({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView});
  static const DispatchKeySet excluded =
      c10::default_excluded_set | c10::autograd_dispatch_keyset | without_names<DispatchKey>();
  if (here.included_.raw_repr() & ~included.raw_repr() || here.excluded_.raw_repr() & ~excluded.raw_repr()) return true;
  if (at::impl::torch_function_mode_enabled() || skips_next<at::impl::PythonTorchFunctionTLS>()) return true;
  if (at::globalContext().deterministicAlgorithms()) return true;
  return at::hasThreadLocalCallbacks() || at::hasGlobalCallbacks();
}

}  // namespace
}  // namespace gating

// Public functions of ours, answered without Python where a call like this one is known to be PyTorch's to serve.
//
// A function of Python's keeps its code, its name and its signature, which inspection, pickling and compilers look at;
// only what runs when it is called comes here first. What is like what is told by all that Python looks at before it
// leaves a call to PyTorch: sizes, strides, dtypes, device, options, whether gradients are recorded, autocast. A kind of
// call that is new, and every call in a mode, a transform, a trace or a profile, runs the function itself, which says
// afterwards that it has left the call to PyTorch, and until when that holds (`tilebook.left`). All of it is under the
// GIL, so that a forked process has all of it too.

#include "autocast.h"
#include "forms.h"
#include "watched.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace gating {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

constexpr size_t kMostGates = 24;
constexpr size_t kMostKinds = 10000;
constexpr int kMostAxes = 8;
constexpr int kVector = 16;  // bytes: kernels of PyTorch's load whole vectors without looking

// ---- What a call is

struct Key {
  std::array<int64_t, 16 + kMostTensors * (2 + 2 * kMostAxes)> parts;
  size_t size = 0;
  void add(int64_t part) { parts[size++] = part; }
  bool operator==(const Key& other) const {
    return size == other.size && std::memcmp(parts.data(), other.parts.data(), size * sizeof(int64_t)) == 0;
  }
};

struct Hash {
  size_t operator()(const Key& key) const { return hashed(key.parts.data(), key.size); }
};

// ---- What is known

// Calls of one kind that are PyTorch's.
struct Kind {
  PyObject* pace;  // asked at each call whose turn it is, or null
  bool bounded;  // only outside of graphs that are being captured
  PyObject* choice;  // whose calls they are
  int64_t calls = 0;
  Kind(PyObject* pace, bool bounded, PyObject* choice) : pace(pace), bounded(bounded), choice(choice) {
    Py_XINCREF(pace);
    Py_INCREF(choice);
  }
  Kind(const Kind&) = delete;
  ~Kind() {
    Py_XDECREF(pace);
    Py_DECREF(choice);
  }
};

using Kinds = std::unordered_map<Key, std::shared_ptr<Kind>, Hash>;

Kinds& kinds = *new Kinds;  // for as long as the process: Python's end is not to be followed by frees of its objects
uint64_t generation = 0;  // of what is known: another after it was forgotten
bool open_now = false, asks = false;

// A call that is being answered by Python, innermost.
struct Pending {
  const Key& key;
  const Call& call;
  uint64_t since = generation;
  Pending* const outer;
  Pending(const Key& key, const Call& call);
  ~Pending();
};

thread_local Pending* pending = nullptr;

Pending::Pending(const Key& key, const Call& call) : key(key), call(call), outer(pending) { pending = this; }
Pending::~Pending() { pending = outer; }

struct Gate {
  PyFunctionObject* function;
  PyObject *code, *defaults, *keyword_defaults, *names;
  vectorcallfunc usual;
  const Form* form;
  int count, positional;
  std::array<PyObject*, kMostArguments> standard;  // what is not given, or null where something must be
  std::array<PyObject*, 2 * kMostArguments> by_keyword;  // names and defaults, as the function's dictionary has them
};

std::array<Gate, kMostGates> gates;
size_t made_gates = 0;

// Are the defaults in the function's dictionary those that it had? It can be changed where it is.
bool same_defaults(const Gate& gate) {
  if (!gate.keyword_defaults) return true;
  size_t next = 0;
  Py_ssize_t at = 0;
  PyObject *name, *value;
  while (PyDict_Next(gate.keyword_defaults, &at, &name, &value)) {
    if (next == gate.by_keyword.size() || gate.by_keyword[next] != name || gate.by_keyword[next + 1] != value) return false;
    next += 2;
  }
  return next == gate.by_keyword.size() || !gate.by_keyword[next];
}

// Writes all that decides whose such a call is into `key`. False for one that Python is to look at.
bool described(Call& call, const Form* form, Key& key) {
  const auto here = c10::impl::tls_local_dispatch_key_set();
  if (unusual(here)) return false;
  key.add(reinterpret_cast<int64_t>(form));
  key.add(call.told);
  key.add(static_cast<int64_t>(here.included_.raw_repr()));
  key.add(static_cast<int64_t>(here.excluded_.raw_repr()));
  const auto kind = served_kind();
  key.add(at::autocast::is_autocast_enabled(kind) ? static_cast<int64_t>(at::autocast::get_autocast_dtype(kind)) : -1);
  bool wanted = false;
  const Tensor* first = nullptr;
  for (int i = 0; i < call.count; ++i) {
    const Tensor& each = call[i];
    if (!each.defined()) {
      key.add(-1);
      continue;
    }
    if (each.dim() > kMostAxes) return false;
    if (!first) {
      first = &each;
      key.add(each.device().index());
    } else if (each.device() != first->device()) {
      return false;
    }
    if (each._fw_grad(0).defined() || reinterpret_cast<uintptr_t>(each.const_data_ptr()) % kVector) return false;
    key.add(static_cast<int64_t>(each.scalar_type()) << 8 | each.dim());
    for (const int64_t size : each.sizes()) key.add(size);
    for (const int64_t stride : each.strides()) key.add(stride);
    wanted |= each.requires_grad();
  }
  call.recorded = wanted && at::GradMode::is_enabled();
  key.add(call.recorded);
  return !call.recorded || at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

// Is a call of the kind PyTorch's here and now? -1 with an exception set.
int allowed(const Kind& kind, const Call& call) {
  if (kind.bounded && captured(call[0].device())) return 0;
  if (!kind.pace) return 1;
  static PyObject* const name = PyUnicode_InternFromString("host_bound");
  PyObject* const answer = staying([&] { return PyObject_CallMethodNoArgs(kind.pace, name); });
  if (!answer) return -1;
  const int theirs = PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return theirs;
}

struct NoGil {
  PyThreadState* state = PyEval_SaveThread();
  ~NoGil() {
    staying([this] { PyEval_RestoreThread(state); });
  }
};

PyObject* served(const Form& form, const Call& call) {
  HANDLE_TH_ERRORS
  std::pair<Tensor, Tensor> found;
  {
    const NoGil released;
    found = form.plain(call);
  }
  PyObject* const y = THPVariable_Wrap(std::move(found.first));
  if (!y || !found.second.defined()) return y;
  PyObject* const h = THPVariable_Wrap(std::move(found.second));
  PyObject* const both = h ? PyTuple_Pack(2, y, h) : nullptr;
  Py_DECREF(y);
  Py_XDECREF(h);
  return both;
  END_HANDLE_TH_ERRORS
}

// Puts the arguments in the order of the names. False where the function itself is to say what is wrong.
bool bound(const Gate& gate, PyObject* const* args, Py_ssize_t count, PyObject* names, PyObject** into) {
  if (count > gate.positional) return false;
  for (int i = 0; i < gate.count; ++i) into[i] = i < count ? args[i] : nullptr;
  const Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* const name = PyTuple_GET_ITEM(names, i);
    int at = 0;
    while (at < gate.count && PyTuple_GET_ITEM(gate.names, at) != name) ++at;
    if (at == gate.count || into[at]) return false;
    into[at] = args[count + i];
  }
  for (int i = 0; i < gate.count; ++i) {
    if (!into[i] && !(into[i] = gate.standard[i])) return false;
  }
  return true;
}

PyObject* passed(const Gate& gate, PyObject* callable, PyObject* const* args, size_t flags, PyObject* names) {
  const auto usually = [&] { return staying([&] { return gate.usual(callable, args, flags, names); }); };
  const auto* function = reinterpret_cast<PyFunctionObject*>(callable);
  if (!open_now || asks || function != gate.function || function->func_code != gate.code) return usually();
  if (function->func_defaults != gate.defaults || function->func_kwdefaults != gate.keyword_defaults) return usually();
  PyObject* given[kMostArguments];
  if (!same_defaults(gate) || !bound(gate, args, PyVectorcall_NARGS(flags), names, given)) return usually();
  if (watched(reinterpret_cast<const PyCodeObject*>(gate.code))) return usually();
  Call call(given);
  Key key;
  if (!gate.form->takes(call) || !described(call, gate.form, key)) return usually();
  const auto it = kinds.find(key);
  if (it == kinds.end()) {
    const Pending now(key, call);
    return usually();
  }
  const auto kind = it->second;
  const int theirs = allowed(*kind, call);
  if (theirs < 0) return nullptr;
  if (!theirs) return usually();
  ++kind->calls;
  return served(*gate.form, call);
}

template <size_t index>
PyObject* entered(PyObject* callable, PyObject* const* args, size_t flags, PyObject* names) {
  return passed(gates[index], callable, args, flags, names);
}

template <size_t... indices>
constexpr std::array<vectorcallfunc, sizeof...(indices)> entries(std::index_sequence<indices...>) {
  return {&entered<indices>...};
}

constexpr auto kEntries = entries(std::make_index_sequence<kMostGates>());

void set_entry(PyFunctionObject* function, vectorcallfunc entry) {
#if PY_VERSION_HEX >= 0x030C0000
  PyFunction_SetVectorcall(function, entry);
#else
  function->vectorcall = entry;  // which calls from C take, and the interpreter's own do not
  function->func_version = 0;
#endif
}

// ---- Python

// Are the names of its arguments, in order, those of the form?
bool named(const Form& form, PyObject* names, int count) {
  PyObject* const words = PyUnicode_FromString(form.arguments);
  PyObject* const expected = words ? PyUnicode_Split(words, nullptr, -1) : nullptr;
  bool same = expected && PyList_GET_SIZE(expected) == count;
  for (int i = 0; same && i < count; ++i) {
    same = PyUnicode_Compare(PyList_GET_ITEM(expected, i), PyTuple_GET_ITEM(names, i)) == 0;
  }
  Py_XDECREF(words);
  Py_XDECREF(expected);
  return same;
}

PyObject* gate(PyObject*, PyObject* given) {
  PyFunctionObject* function;
  const char* name;
  if (!PyArg_ParseTuple(given, "O!s", &PyFunction_Type, &function, &name)) return nullptr;
  for (size_t i = 0; i < made_gates; ++i) {
    if (gates[i].function == function) Py_RETURN_NONE;
  }
  const auto* code = reinterpret_cast<PyCodeObject*>(function->func_code);
  Gate made{};
  made.count = code->co_argcount + code->co_kwonlyargcount;
  made.positional = code->co_argcount;
  made.names = PyObject_GetAttrString(function->func_code, "co_varnames");
  if (!made.names) return nullptr;
  for (const auto& form : forms()) {
    if (std::strcmp(form.name, name) == 0 && named(form, made.names, made.count)) made.form = &form;
  }
  const int open_arguments = code->co_flags & (CO_VARARGS | CO_VARKEYWORDS | CO_GENERATOR | CO_COROUTINE);
  if (!made.form || made_gates == kMostGates || open_arguments || made.count > kMostArguments) {
    Py_DECREF(made.names);
    return PyErr_Format(PyExc_ValueError, "no gate is made for %s", name);
  }
  made.function = function;
  made.code = function->func_code;
  made.defaults = function->func_defaults;
  made.keyword_defaults = function->func_kwdefaults;
  made.usual = function->vectorcall;
  const Py_ssize_t with = made.defaults ? PyTuple_GET_SIZE(made.defaults) : 0;
  for (Py_ssize_t i = 0; i < with; ++i) {
    made.standard[made.positional - with + i] = PyTuple_GET_ITEM(made.defaults, i);
  }
  for (int i = made.positional; made.keyword_defaults && i < made.count; ++i) {
    made.standard[i] = PyDict_GetItemWithError(made.keyword_defaults, PyTuple_GET_ITEM(made.names, i));
  }
  Py_ssize_t at = 0;
  size_t next = 0;
  PyObject *word, *value;
  while (made.keyword_defaults && next < made.by_keyword.size() && PyDict_Next(made.keyword_defaults, &at, &word, &value)) {
    made.by_keyword[next++] = word;
    made.by_keyword[next++] = value;
  }
  for (PyObject* each : made.standard) Py_XINCREF(each);
  for (PyObject* each : made.by_keyword) Py_XINCREF(each);
  for (PyObject* each : {reinterpret_cast<PyObject*>(function), made.code, made.defaults, made.keyword_defaults}) Py_XINCREF(each);
  gates[made_gates] = made;
  set_entry(function, kEntries[made_gates++]);
  Py_RETURN_NONE;
}

PyObject* open(PyObject*, PyObject* given) {
  PyObject *compiler, *parameter;
  if (!PyArg_ParseTuple(given, "O!O!", &PyModule_Type, &compiler, &PyType_Type, &parameter)) return nullptr;
  Py_INCREF(parameter);
  Py_XSETREF(parameter_type, reinterpret_cast<PyTypeObject*>(parameter));
  watch(compiler);
  open_now = true;
  Py_RETURN_NONE;
}

PyObject* close(PyObject*, PyObject*) {
  open_now = false;
  Py_RETURN_NONE;
}

PyObject* gates_ask(PyObject*, PyObject* given) {
  int all;
  if (!PyArg_ParseTuple(given, "p", &all)) return nullptr;
  asks = all;
  Py_RETURN_NONE;
}

PyObject* settle(PyObject*, PyObject* given) {
  PyObject *side, *choice, *tensors;
  int bounded;
  if (!PyArg_ParseTuple(given, "OpOO!", &side, &bounded, &choice, &PyTuple_Type, &tensors)) return nullptr;
  const Pending* now = pending;
  if (!now || now->since != generation || side == Py_False) Py_RETURN_NONE;
  Py_ssize_t at = 0;
  for (int i = 0; i < now->call.count; ++i) {
    PyObject* const each = now->call.objects[i];
    if (!each) continue;
    if (at == PyTuple_GET_SIZE(tensors) || PyTuple_GET_ITEM(tensors, at++) != each) Py_RETURN_NONE;
  }
  if (at != PyTuple_GET_SIZE(tensors)) Py_RETURN_NONE;
  auto made = std::make_shared<Kind>(side == Py_True ? nullptr : side, bounded, choice);
  if (kinds.size() < kMostKinds) kinds.insert_or_assign(now->key, std::move(made));
  Py_RETURN_NONE;
}

// [(choice, calls)]
PyObject* counts(const Kinds& of) {
  std::vector<std::shared_ptr<Kind>> all;  // what is made of them may run anything
  for (const auto& each : of) {
    if (each.second->calls) all.push_back(each.second);
  }
  PyObject* list = PyList_New(0);
  for (const auto& each : all) {
    PyObject* const pair = list ? Py_BuildValue("(OL)", each->choice, static_cast<long long>(each->calls)) : nullptr;
    each->calls = 0;
    if (!pair || PyList_Append(list, pair) != 0) Py_CLEAR(list);
    Py_XDECREF(pair);
    if (!list) break;
  }
  return list;
}

PyObject* gates_counted(PyObject*, PyObject*) { return counts(kinds); }

PyObject* forget(PyObject*, PyObject*) {
  Kinds before;
  before.swap(kinds);
  ++generation;
  return counts(before);
}

}  // namespace
}  // namespace gating

using namespace gating;

PyMethodDef gate_methods[] = {
    {"gate", gate, METH_VARARGS, "Has calls of this function come here first; by the name of its form."},
    {"open", open, METH_VARARGS, "Answers; given torch.compiler and torch.nn.Parameter."},
    {"close", close, METH_NOARGS, "Answers none any more."},
    {"gates_ask", gates_ask, METH_VARARGS, "Leaves every call to the functions themselves, if true."},
    {"settle", settle, METH_VARARGS, "The call that is under way, of (tensors), was PyTorch's: (side, bounded, choice, tensors)."},
    {"gates_counted", gates_counted, METH_NOARGS, "[(choice, calls since last asked)]"},
    {"forget", forget, METH_NOARGS, "Forgets all kinds of calls; what `gates_counted` would say."},
    {nullptr, nullptr, 0, nullptr}};

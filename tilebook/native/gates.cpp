// Public functions of ours, answered without Python where a call like this one is known to be PyTorch's to serve.
//
// A function of Python's keeps its code, its name and its signature, which inspection, pickling and compilers look at;
// only what runs when it is called comes here first. What is like what is told by all that Python looks at before it
// leaves a call to PyTorch: sizes, strides, dtypes, device, options, whether gradients are recorded, autocast. A kind of
// call that is new, and every call in a mode, a transform, a trace or a profile, runs the function itself, which says
// afterwards that it has left the call to PyTorch, and until when that holds (`tilebook.left`). All of it is under the
// GIL, so that a forked process has all of it too.

#include "shared.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace gating {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

constexpr size_t kMostGates = 16;
constexpr size_t kMostKinds = 10000;
constexpr int kMostArguments = 16;
constexpr int kMostTensors = 5;
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

// Four at a time, which do not wait for each other.
struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t lanes[4] = {1469598103934665603ull, 1099511628211ull, 14029467366897019727ull, 1609587929392839161ull};
    for (size_t i = 0; i < key.size; ++i) {
      uint64_t& lane = lanes[i & 3];
      lane = (lane ^ static_cast<uint64_t>(key.parts[i])) * 11400714785074694791ull;
      lane ^= lane >> 29;
    }
    uint64_t hash = 0;
    for (const uint64_t lane : lanes) hash = (hash ^ lane) * 11400714785074694791ull;
    return hash ^ hash >> 31;
  }
};

// The arguments of a call as one of the forms below takes them; tensors that are None are undefined. Each is held once
// more while Python's lock is: who copies a tensor that an object of Python's alone holds, takes the lock for it.
struct Call {
  PyObject* const* given;
  std::array<PyObject*, kMostTensors> objects;
  std::array<Tensor, kMostTensors> tensors;
  const Tensor& operator[](int index) const { return tensors[index]; }
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
  std::pair<Tensor, Tensor> (*plain)(const Call&);
};

PyTypeObject* parameter_type = nullptr;
PyObject *compiler_names = nullptr, *compiling_name = nullptr;  // of torch.compiler

bool tensor(Call& call, int index) {
  PyObject* given = call.given[index];
  if (reinterpret_cast<PyObject*>(Py_TYPE(given)) != THPVariableClass && Py_TYPE(given) != parameter_type) return false;
  call.objects[call.count] = given;
  call.tensors[call.count++] = THPVariable_Unpack(given);
  return true;
}

bool tensor_or_none(Call& call, int index) {
  if (call.given[index] != Py_None) return tensor(call, index);
  call.objects[call.count++] = nullptr;
  return true;
}

bool flag(PyObject* given, bool& into) {
  into = given == Py_True;
  return into || given == Py_False;
}

bool zero(PyObject* given) { return PyFloat_CheckExact(given) && PyFloat_AS_DOUBLE(given) == 0.0; }

bool positive_or_none(PyObject* given, std::optional<double>& into) {
  if (given == Py_None) return true;
  if (!PyFloat_CheckExact(given) || !(PyFloat_AS_DOUBLE(given) > 0.0)) return false;
  into = PyFloat_AS_DOUBLE(given);
  return true;
}

bool real(PyObject* given, double& into) {
  if (!PyFloat_CheckExact(given)) return false;
  into = PyFloat_AS_DOUBLE(given);
  return true;
}

// Which of these words it is, or -1.
int word(PyObject* given, std::initializer_list<const char*> words) {
  if (!PyUnicode_CheckExact(given)) return -1;
  int index = 0;
  for (const char* each : words) {
    if (PyUnicode_CompareWithASCIIString(given, each) == 0) return index;
    ++index;
  }
  return -1;
}

// ---- Forms

Tensor sdpa(const Call& call, const std::optional<Tensor>& mask, bool causal, std::optional<double> scale, bool grouped) {
  return at::scaled_dot_product_attention(call[0], call[1], call[2], mask, 0.0, causal, scale, grouped);
}

bool four_axes(const Call& call) {
  return call[0].dim() == 4 && call[1].dim() == 4 && call[2].dim() == 4;
}

bool takes_attention(Call& call) {
  const auto* given = call.given;  // q, k, v, causal, scale, window, softcap, slopes, bias, mask, dropout, lse, …
  bool causal;
  if (!flag(given[3], causal) || !positive_or_none(given[4], call.scale)) return false;
  if (given[5] != Py_None || !zero(given[6]) || given[7] != Py_None || given[8] != Py_None) return false;
  if (given[9] != Py_None || !zero(given[10]) || given[11] != Py_False || given[12] != Py_False) return false;
  if (given[13] != Py_None) return false;
  call.told = causal;
  return tensor(call, 0) && tensor(call, 1) && tensor(call, 2) && four_axes(call);
}

std::pair<Tensor, Tensor> attention(const Call& call) {
  return {sdpa(call, {}, call.told, call.scale, call[0].size(1) != call[1].size(1)), {}};
}

bool takes_drop_in(Call& call) {
  const auto* given = call.given;  // query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
  bool causal, grouped;
  if (!flag(given[5], causal) || !flag(given[7], grouped) || !zero(given[4])) return false;
  call.told = causal | grouped << 1;
  if (!positive_or_none(given[6], call.scale)) return false;
  return tensor(call, 0) && tensor(call, 1) && tensor(call, 2) && tensor_or_none(call, 3) && four_axes(call);
}

std::pair<Tensor, Tensor> drop_in(const Call& call) {
  const auto& mask = call[3];
  const auto there = mask.defined() ? std::optional<Tensor>(mask) : std::nullopt;
  return {sdpa(call, there, call.told & 1, call.scale, call.told & 2), {}};
}

bool takes_decode(Call& call) {
  const auto* given = call.given;  // q, k, v, seq_lens, block_table, causal, scale, softcap, window, return_lse
  bool causal;
  if (given[3] != Py_None || given[4] != Py_None || !flag(given[5], causal) || !zero(given[7])) return false;
  if (given[8] != Py_None || given[9] != Py_False || !positive_or_none(given[6], call.scale)) return false;
  call.told = causal;
  return tensor(call, 0) && tensor(call, 1) && tensor(call, 2) && four_axes(call) && call[0].size(2) == 1;
}

std::pair<Tensor, Tensor> decode(const Call& call) {
  const auto& q = call[0];
  const double scale = call.scale.value_or(std::pow(static_cast<double>(q.size(-1)), -0.5));
  return {sdpa(call, {}, false, scale, q.size(1) != call[1].size(1)), {}};
}

// x, perhaps what is added to it, then vectors of its dtype or None; the last argument is eps.
template <int addends, int vectors>
bool takes_norm(Call& call) {
  for (int i = 0; i < addends; ++i) {
    if (!tensor(call, i)) return false;
  }
  for (int i = addends; i < addends + vectors; ++i) {
    if (!tensor_or_none(call, i)) return false;
  }
  const auto& x = call[0];
  for (int i = 1; i < addends + vectors; ++i) {
    if (call[i].defined() && call[i].scalar_type() != x.scalar_type()) return false;
  }
  return x.dim() > 0 && real(call.given[addends + vectors], call.number);
}

template <int addends, int vectors>
std::pair<Tensor, Tensor> norm(const Call& call) {
  const Tensor sum = addends > 1 ? at::add(call[0], call[1]) : Tensor();
  const auto& x = addends > 1 ? sum : call[0];
  const auto vector = [&](int index) {
    const auto& there = call[addends + index];
    return there.defined() ? std::optional<Tensor>(there) : std::nullopt;
  };
  const int64_t shape[] = {x.size(-1)};
  Tensor y;
  if constexpr (vectors == 1) {
    y = at::rms_norm(x, shape, vector(0), call.number);
  } else {
    y = at::layer_norm(x, shape, vector(0), vector(1), call.number);
  }
  if (y.scalar_type() != x.scalar_type()) y = y.to(x.scalar_type());  // autocast would have it in fp32
  return {y, sum};
}

bool takes_mlp(Call& call) {
  const int which = word(call.given[5], {"gelu", "gelu_tanh", "relu"});
  call.told = which;
  if (which < 0) return false;
  for (int i = 0; i < 5; ++i) {
    if (!tensor(call, i)) return false;
  }
  return true;
}

std::pair<Tensor, Tensor> block(const Call& call) {
  return {mlp(call[0], call[1], call[2], call[3], call[4], static_cast<Activation>(call.told)), {}};
}

constexpr int64_t kReductions = 3;

bool takes_loss(Call& call) {
  const auto* given = call.given;  // input, target, weight, ignore_index, reduction, smoothing, softcap, z_loss
  const int reduction = word(given[4], {"none", "mean", "sum"});  // in PyTorch's order
  int beyond = 1;
  if (PyLong_CheckExact(given[3])) call.index = PyLong_AsLongLongAndOverflow(given[3], &beyond);
  if (given[2] != Py_None || reduction < 0 || beyond || !zero(given[6]) || !zero(given[7])) return false;
  if (!real(given[5], call.number)) return false;
  call.told = reduction + kReductions * (call.number != 0);
  return tensor(call, 0) && tensor(call, 1);
}

std::pair<Tensor, Tensor> loss(const Call& call) {
  return {at::cross_entropy_loss(call[0], call[1], {}, call.told % kReductions, call.index, call.number), {}};
}

constexpr Form forms[] = {
    {"attention",
     "q k v causal scale window softcap alibi_slopes bias attn_mask dropout_p return_lse deterministic approx",
     takes_attention, attention},
    {"scaled_dot_product_attention", "query key value attn_mask dropout_p is_causal scale enable_gqa", takes_drop_in,
     drop_in},
    {"attention_decode", "q k v seq_lens block_table causal scale softcap window return_lse", takes_decode, decode},
    {"rms_norm", "x weight eps", takes_norm<1, 1>, norm<1, 1>},
    {"layer_norm", "x weight bias eps", takes_norm<1, 2>, norm<1, 2>},
    {"add_rms_norm", "x residual weight eps", takes_norm<2, 1>, norm<2, 1>},
    {"add_layer_norm", "x residual weight bias eps", takes_norm<2, 2>, norm<2, 2>},
    {"mlp", "x w1 b1 w2 b2 activation", takes_mlp, block},
    {"cross_entropy", "input target weight ignore_index reduction label_smoothing softcap z_loss", takes_loss, loss},
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
};

std::array<Gate, kMostGates> gates;
size_t made_gates = 0;

// Does anybody look at Python's frames, or trace what runs?
bool watched() {
  const PyThreadState* thread = PyThreadState_Get();
  if (thread->c_tracefunc || thread->c_profilefunc) return true;
  if (_PyInterpreterState_GetEvalFrameFunc(PyInterpreterState_Get()) != _PyEval_EvalFrameDefault) return true;
  return PyDict_GetItemWithError(compiler_names, compiling_name) != Py_False;
}

// Is the next call one that no override is to see? Only newer PyTorchs have such a state.
template <class State>
bool skips_next() {
  if constexpr (requires { State::peek_skip_next(); }) return State::peek_skip_next();
  return false;
}

// Is a mode, a transform, a trace or a profile under way, which is to see the function itself or each of its calls?
bool unusual(const c10::impl::LocalDispatchKeySet& here) {
  static const DispatchKeySet included({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView});
  static const DispatchKeySet excluded = c10::default_excluded_set | c10::autograd_dispatch_keyset;
  if (here.included_.raw_repr() & ~included.raw_repr() || here.excluded_.raw_repr() & ~excluded.raw_repr()) return true;
  if (at::impl::torch_function_mode_enabled() || skips_next<at::impl::PythonTorchFunctionTLS>()) return true;
  if (at::globalContext().deterministicAlgorithms()) return true;
  return at::hasThreadLocalCallbacks() || at::hasGlobalCallbacks();
}

// Writes all that decides whose such a call is into `key`. False for one that Python is to look at.
bool described(Call& call, const Form* form, Key& key) {
  const auto here = c10::impl::tls_local_dispatch_key_set();
  if (unusual(here)) return false;
  const auto kind = served_kind();
  key.add(reinterpret_cast<int64_t>(form));
  key.add(call.told);
  key.add(static_cast<int64_t>(here.included_.raw_repr()));
  key.add(static_cast<int64_t>(here.excluded_.raw_repr()));
  key.add(at::autocast::is_autocast_enabled(kind) ? static_cast<int64_t>(at::autocast::get_autocast_dtype(kind)) : -1);
  bool wanted = false;
  const Tensor* first = nullptr;
  for (int i = 0; i < call.count; ++i) {
    const Tensor& each = call[i];
    if (!each.defined()) {
      key.add(-1);
      continue;
    }
    if (each.device().type() != kind || !ordinary(each, kind) || each.dim() > kMostAxes) return false;
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
  PyObject* const answer = PyObject_CallMethodNoArgs(kind.pace, name);
  if (!answer) return -1;
  const int theirs = PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return theirs;
}

struct NoGil {
  PyThreadState* state = PyEval_SaveThread();
  ~NoGil() { PyEval_RestoreThread(state); }
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
  const auto usually = [&] { return gate.usual(callable, args, flags, names); };
  const auto* function = reinterpret_cast<PyFunctionObject*>(callable);
  if (!open_now || asks || function != gate.function || function->func_code != gate.code) return usually();
  if (function->func_defaults != gate.defaults || function->func_kwdefaults != gate.keyword_defaults) return usually();
  PyObject* given[kMostArguments];
  if (!bound(gate, args, PyVectorcall_NARGS(flags), names, given) || watched()) return usually();
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
  for (const auto& form : forms) {
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
  for (PyObject* each : made.standard) Py_XINCREF(each);
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
  Py_INCREF(PyModule_GetDict(compiler));
  Py_XSETREF(compiler_names, PyModule_GetDict(compiler));
  if (!compiling_name) compiling_name = PyUnicode_InternFromString("_is_compiling_flag");
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

// What autocast casts of a model's weights, many at a time.
//
// Autocast casts each weight when a region first uses it, and keeps the cast until the region ends: for each a call, a
// kernel, a node of autograd, and as much again for its gradient. Here the weights that a region has used one after the
// other are cast together from the next region on, by one kernel and one node, when the first of them is used. The
// numbers are the same, and so is how long they live: PyTorch keeps what is used, as its own cast, and the rest hangs on
// a cast that it keeps for the region. Whatever is no ordinary leaf in memory, and every weight while this is off, is
// PyTorch's own affair.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autocast.h"
#include "shared.h"

namespace casts {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
using Tensors = std::vector<Tensor>;

constexpr size_t kMost = 16;  // weights of a group
constexpr int64_t kMostBytes = 32 << 20;  // of a group: gradients are not to wait for each other long
constexpr size_t kMostWeights = 20000;
constexpr int kMostInVain = 3;  // casts that no one used, after which a weight is cast by itself

std::atomic<bool> casting{false};

// fp32 → autocast's dtype, and gradients back, as `Tensor.to` does it for each.
struct Together : torch::autograd::Function<Together> {
  static Tensors forward(torch::autograd::AutogradContext* ctx, at::TensorList weights, at::ScalarType dtype);
  static Tensors backward(torch::autograd::AutogradContext* ctx, Tensors gradients);
};

Tensors cast(at::TensorList weights, at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView below;
  constexpr int64_t kLine = 128;  // elements: where each begins is aligned
  int64_t total = 0;
  for (const auto& each : weights) total += (each.numel() + kLine - 1) / kLine * kLine;
  const Tensor flat = at::empty({total}, weights[0].options().dtype(dtype));
  Tensors found;
  found.reserve(weights.size());
  int64_t start = 0;
  for (const auto& each : weights) {
    found.push_back(flat.as_strided(each.sizes(), each.strides(), start));
    start += (each.numel() + kLine - 1) / kLine * kLine;
  }
  at::_foreach_copy_(found, weights);
  return found;
}

Tensors Together::forward(torch::autograd::AutogradContext* ctx, at::TensorList weights, at::ScalarType dtype) {
  ctx->set_materialize_grads(false);
  return cast(weights, dtype);
}

bool plain(const Tensor& tensor) { return ::ordinary(tensor, tensor.device().type()); }

Tensors Together::backward(torch::autograd::AutogradContext* ctx, Tensors gradients) {
  Tensors found(gradients.size()), given, made;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const auto& each = gradients[i];
    if (!each.defined() || !ctx->needs_input_grad(i)) continue;
    if (at::GradMode::is_enabled() || !plain(each)) {
      found[i] = each.to(at::kFloat);
      continue;
    }
    found[i] = at::empty_like(each, each.options().dtype(at::kFloat));
    given.push_back(each);
    made.push_back(found[i]);
  }
  if (!given.empty()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::_foreach_copy_(made, given);
  }
  found.emplace_back();  // of the dtype
  return found;
}

// Where work is put: a cast that nobody has used yet is only good where it was made.
struct Place {
  void* stream;
  bool captured;
  bool operator==(const Place&) const = default;
};

Place place_of(c10::Device device) {
  return {stream_of(device), captured(device)};
}

// The casts of one region of autocast, of one thread: those that nobody has used yet. What was used has no tensor here.
struct Region {
  struct Cast {
    Tensor tensor;
    uint32_t version;  // of the weight
    const void* data;
    bool recorded;
    Place place;
  };
  std::unordered_map<c10::TensorImpl*, Cast> casts;
};

// What a thread knows of the weights that its regions cast. An address that is a key is no other tensor's: a weak
// reference keeps it.
struct Known {
  struct Weight {
    Weak self;
    std::vector<int64_t> sizes;
    int group = -1;
    int in_vain = 0;
  };
  Known() : input(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()), cast_input(input) {}

  std::unordered_map<c10::TensorImpl*, Weight> weights;
  std::vector<std::vector<c10::TensorImpl*>> groups;
  std::vector<c10::TensorImpl*> alone, unused;  // cast by themselves in this region; cast with others, not used so far
  std::weak_ptr<Region> region;
  Weak input, cast_input;  // of the last product
  uint32_t input_version = 0;
  const void* input_data = nullptr;
  Place input_place{};
  Tensor mark;  // a weight of no elements: PyTorch keeps its cast, on which the region's hang, for as long as any

  void regroup();
};

thread_local std::unique_ptr<Known> known;

// Between regions: what was cast alone is grouped in the order of its use; what was cast in vain is cast alone again.
void Known::regroup() {
  for (auto* each : unused) {
    auto& weight = weights.at(each);
    auto& group = groups[weight.group];
    group.erase(std::remove(group.begin(), group.end(), each), group.end());
    weight.group = -1;
    ++weight.in_vain;
  }
  int64_t bytes = 0;
  bool open = false;
  c10::Device device = c10::kCPU;
  for (auto* each : alone) {
    auto& weight = weights.at(each);
    const auto tensor = Tensor(weight.self.lock());
    if (weight.group >= 0 || weight.in_vain >= kMostInVain || !tensor.defined()) continue;
    const auto size = static_cast<int64_t>(tensor.nbytes());
    if (!open || groups.back().size() == kMost || bytes + size > kMostBytes || tensor.device() != device) {
      groups.emplace_back();
      open = true;
      bytes = 0;
      device = tensor.device();
    }
    bytes += size;
    weight.group = static_cast<int>(groups.size()) - 1;
    groups.back().push_back(each);
  }
  alone.clear();
  unused.clear();
  if (weights.size() > kMostWeights) {
    weights.clear();
    groups.clear();
  }
}

// Is it a weight whose cast autocast keeps, and nothing but its memory?
bool eligible(const Tensor& weight, c10::DeviceType device) {
  if (!weight.defined() || weight.scalar_type() != at::kFloat || weight.device().type() != device) return false;
  if (!weight.requires_grad() || !weight.is_leaf() || weight.is_view() || !plain(weight)) return false;
  if (at::caching::is_cached_tensor(weight) || !weight.numel() || !weight.is_non_overlapping_and_dense()) return false;
  if (weight.is_inference() || weight._fw_grad(0).defined()) return false;
  return weight.storage().nbytes() >= (weight.storage_offset() + weight.numel()) * sizeof(float);
}

// May a call cast several at a time? Not in a transform, a trace or a mode, which are to see each cast by itself.
bool ordinary() {
  static const DispatchKeySet unusual({DispatchKey::Python, DispatchKey::FuncTorchDynamicLayerFrontMode,
                                       DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::FuncTorchBatched,
                                       DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize});
  if (c10::impl::TorchDispatchModeTLS::stack_len() || c10::InferenceMode::is_enabled()) return false;
  if (!(c10::impl::tls_local_dispatch_key_set().included_ & unusual).empty()) return false;
  return at::autocast::is_autocast_cache_enabled() && !torch::jit::tracer::isTracing();
}

// The region that this thread is in; a new one where PyTorch keeps no cast of the mark.
std::shared_ptr<Region> region_of(at::ScalarType dtype, c10::Device device) {
  if (!known) known = std::make_unique<Known>();
  if (auto there = known->region.lock()) return there;
  known->regroup();
  if (!known->mark.defined() || known->mark.device() != device) {
    known->mark = at::empty({0}, at::TensorOptions().dtype(at::kFloat).device(device)).requires_grad_();
  }
  const Tensor kept = at::autocast::cached_cast(dtype, known->mark, device.type());
  if (!at::autocast::cached_cast(dtype, known->mark, device.type()).is_same(kept)) return nullptr;
  auto made = std::make_shared<Region>();
  auto* owner = new std::shared_ptr<Region>(made);
  auto* storage = kept.storage().unsafeGetStorageImpl();
  storage->set_data_ptr_noswap(c10::DataPtr(
      nullptr, owner, [](void* held) { delete static_cast<std::shared_ptr<Region>*>(held); }, kept.device()));
  known->region = made;
  return made;
}

// Is it to be told of its gradient by itself? A hook of Python's is not to be called where there is none.
bool heard(const Tensor& weight) {
  using torch::autograd::utils::LambdaPostHook;  // as DistributedDataParallel has, which looks whether there is one
  if (!torch::autograd::impl::hooks(weight).empty()) return true;
  const auto node = torch::autograd::impl::try_get_grad_accumulator(weight);
  if (!node) return false;
  const auto& after = node->post_hooks();
  return !node->pre_hooks().empty() || std::any_of(after.begin(), after.end(), [](const auto& each) {
    return !dynamic_cast<LambdaPostHook*>(each.get());
  });
}

// Where the node that casts together sends a gradient: nowhere, until the weight is used.
torch::autograd::Edge& edge_of(const Tensor& cast) {
  return const_cast<torch::autograd::Edge&>(cast.grad_fn()->next_edge(cast.output_nr()));
}

// A weight's cast, which PyTorch, that holds the lock of its cache meanwhile, is about to keep.
Tensor first_use(const Tensor& weight, at::ScalarType dtype) {
  const auto region = known->region.lock();
  const bool recorded = at::GradMode::is_enabled();
  const auto place = place_of(weight.device());
  auto* const impl = weight.unsafeGetTensorImpl();
  auto& there = region->casts[impl];
  if (const Tensor ready = std::move(there.tensor); ready.defined()) {
    const bool same = there.version == weight._version() && there.data == weight.const_data_ptr() && there.place == place;
    if (same && ready.scalar_type() == dtype && (there.recorded || !recorded)) {
      auto& unused = known->unused;
      unused.erase(std::remove(unused.begin(), unused.end(), impl), unused.end());
      if (!recorded) return ready.detach();
      edge_of(ready) = torch::autograd::impl::gradient_edge(weight);
      return ready;
    }
  }
  auto found = known->weights.find(impl);
  if (found == known->weights.end()) {
    found = known->weights.emplace(impl, Known::Weight{Weak(weight.getIntrusivePtr()), weight.sizes().vec()}).first;
  }
  Tensors members{weight};
  if (found->second.group >= 0 && !heard(weight)) {
    for (auto* each : known->groups[found->second.group]) {
      const auto& other = known->weights.at(each);
      if (each == impl || region->casts.count(each)) continue;
      const Tensor member(other.self.lock());
      if (!member.defined() || member.sizes() != c10::IntArrayRef(other.sizes) || member.device() != weight.device()) continue;
      // Memory that it shares may be about to be filled.
      const bool own = eligible(member, weight.device().type()) && member.storage().nbytes() == member.nbytes();
      if (own && !heard(member)) members.push_back(member);
    }
  } else if (found->second.group < 0) {
    known->alone.push_back(impl);
  }
  const auto casts = recorded ? Together::apply(at::TensorList(members), dtype) : cast(members, dtype);
  for (size_t i = 1; i < members.size(); ++i) {
    auto* each = members[i].unsafeGetTensorImpl();
    if (recorded) edge_of(casts[i]) = {};
    region->casts[each] = {
        casts[i], static_cast<uint32_t>(members[i]._version()), members[i].const_data_ptr(), recorded, place};
    known->unused.push_back(each);
  }
  return casts[0];
}

// The key of no tensor, on which PyTorch's cache, while it is asked for a weight, asks for a cast that it has not.
constexpr DispatchKey kAsked = DispatchKey::TESTING_ONLY_GenericMode;

Tensor asked(const Tensor& weight, at::ScalarType dtype, bool, bool, std::optional<at::MemoryFormat>) {
  const c10::impl::ExcludeDispatchKeyGuard once(kAsked);
  return first_use(weight, dtype);
}

// What products that are given the same x make of it, cast once for as long as one of them keeps it for its gradient.
Tensor cast_input(const Tensor& x, at::ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  if (!known) known = std::make_unique<Known>();
  const auto place = place_of(x.device());
  const Tensor before(known->input.lock());
  const bool same = known->input_version == x._version() && known->input_data == x.const_data_ptr();
  if (before.defined() && before.is_same(x) && same && known->input_place == place) {
    Tensor there(known->cast_input.lock());
    if (there.defined() && there.scalar_type() == dtype) return there;
  }
  Tensor made = x.to(dtype);
  known->input = Weak(x.getIntrusivePtr());
  known->cast_input = Weak(made.getIntrusivePtr());
  known->input_version = x._version();
  known->input_data = x.const_data_ptr();
  known->input_place = place;
  return made;
}

Tensor sum_of_columns(const Tensor& rows, at::ScalarType dtype) {
  return rows.is_cuda() ? at::sum(rows, {0}, false, dtype) : at::sum(rows, 0).to(dtype);
}

}  // namespace
}  // namespace casts

at::Tensor column_sum(const at::Tensor& rows, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("tilebook_native::column_sum", "")
                             .typed<at::Tensor(const at::Tensor&, at::ScalarType)>();
  return op.call(rows, dtype);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, bool recorded) {
  static const auto wide = c10::Dispatcher::singleton().findSchema({"aten::mm", "dtype"});  // from PyTorch 2.8 on
  if (a.scalar_type() == dtype) return at::mm(a, b);
  if (recorded || !wide || !a.is_cuda() || dtype != at::kFloat || at::globalContext().hasROCM()) {
    return at::mm(a, b).to(dtype);
  }
  return wide->typed<at::Tensor(const at::Tensor&, const at::Tensor&, at::ScalarType)>().call(a, b, dtype);
}

const at::Tensor& target(const at::Tensor& weight, const at::Tensor& cast) {
  const bool known = weight.scalar_type() == at::kFloat && weight.requires_grad() && cast.requires_grad();
  return known && ordinary(weight, weight.device().type()) && !weight._fw_grad(0).defined() ? weight : cast;
}

namespace casts {
namespace {

// The casts of a product's weight and bias: arguments beside those that gradients are of.
struct Casts {
  Tensor weight;
  std::optional<Tensor> bias;
};

// x Wᵀ + b, x, W and b in whatever dtypes: by the calls of PyTorch's linear and of its gradients, with one node of
// autograd for five. Gradients are in the dtype of what they are of.
struct Product : torch::autograd::Function<Product> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Casts& casts) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    const Tensor& factor = casts.weight;
    const Tensor given = cast_input(x, factor.scalar_type());
    // Not `needs_input_grad`, which tells what a backward pass is asked for, if this runs inside of one.
    const Tensor right = x.requires_grad() ? factor : Tensor(), left = weight.requires_grad() ? given : Tensor();
    // In the order of PyTorch's addmm, or mm, by which they are compared where they are recomputed.
    ctx->save_for_backward(bias ? Tensors{left, right} : Tensors{right, left});
    const auto dtype = [](const Tensor& each) { return static_cast<int64_t>(each.scalar_type()); };
    ctx->saved_data["dtypes"] = std::vector<int64_t>{dtype(x), dtype(weight), bias ? dtype(*bias) : 0};
    ctx->saved_data["bias"] = bias && bias->requires_grad();
    ctx->saved_data["addmm"] = bias.has_value();
    const Tensor rows = x.dim() == 2 ? given : given.view({-1, x.size(-1)});
    const Tensor y = bias ? at::addmm(*casts.bias, rows, factor.t()) : at::mm(rows, factor.t());
    return x.dim() == 2 ? y : y.view(with_last(x.sizes(), factor.size(0)));
  }

  static Tensors backward(torch::autograd::AutogradContext* ctx, Tensors gradients) {
    const auto& dy = gradients[0];
    Tensors found(4);
    if (!dy.defined()) return found;
    auto saved = ctx->get_saved_variables();
    if (!ctx->saved_data["addmm"].toBool()) std::swap(saved[0], saved[1]);
    auto &given = saved[0], &factor = saved[1];
    const bool twice = at::GradMode::is_enabled(), recorded = twice || !plain(dy);
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!recorded) below.emplace();
    const auto dtypes = ctx->saved_data["dtypes"].toIntVector();
    const auto dtype = [&](size_t index) { return static_cast<at::ScalarType>(dtypes[index]); };
    const Tensor rows = dy.dim() == 2 ? dy : dy.reshape({-1, dy.size(-1)});
    if (factor.defined() && ctx->needs_input_grad(0)) {
      const Tensor dx = product(rows, factor, dtype(0), recorded);
      found[0] = dy.dim() == 2 ? dx : dx.view(with_last(dy.sizes(), dx.size(1)));
    }
    if (given.defined() && ctx->needs_input_grad(1)) {
      const auto node = torch::autograd::get_current_node();
      if (twice && given.scalar_type() != dtype(0) && node->next_edge(0).is_valid()) {
        given = given.detach();  // the cast of x was no node: its gradient goes where that of x does
        torch::autograd::impl::set_gradient_edge(given, node->next_edge(0));
      }
      found[1] = product(rows.t(), given.reshape({-1, given.size(-1)}), dtype(1), recorded);
    }
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) {
      found[2] = recorded ? at::sum(rows, 0).to(dtype(2)) : column_sum(rows, dtype(2));
    }
    return found;
  }

  static std::vector<int64_t> with_last(c10::IntArrayRef sizes, int64_t last) {
    auto found = sizes.vec();
    found.back() = last;
    return found;
  }
};

template <c10::DeviceType device>
DispatchKeySet autocast_key() {
  return DispatchKeySet(device == c10::kCUDA ? DispatchKey::AutocastCUDA : DispatchKey::AutocastCPU);
}

// Does PyTorch's linear make one product of it, of rows that lie in memory as they are? Else it rounds once more.
bool one_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (!casting.load(std::memory_order_relaxed) || !at::GradMode::is_enabled() || !ordinary()) return false;
  if (!plain(x) || !plain(weight) || weight.device() != x.device()) return false;
  const bool shapes = (x.dim() == 2 || x.dim() == 3) && weight.dim() == 2 && x.is_contiguous() && x.numel() > 1;
  const bool floats = x.scalar_type() == at::kFloat || x.scalar_type() == weight.scalar_type();
  if (!shapes || !floats) return false;
  // By its strides PyTorch chooses how a gradient is computed, even where a dimension is of one.
  const auto width = x.size(-1);
  if (x.stride(-1) != 1 || x.stride(-2) != width || x.stride(0) != x.numel() / x.size(0)) return false;
  if (weight.stride(1) != 1 || weight.stride(0) != weight.size(1)) return false;
  if (x._fw_grad(0).defined() || weight._fw_grad(0).defined() || (bias && bias->_fw_grad(0).defined())) return false;
  if (bias && (bias->dim() != 1 || !plain(*bias) || bias->scalar_type() != weight.scalar_type())) return false;
  return x.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad());
}

template <c10::DeviceType device>
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const c10::impl::ExcludeDispatchKeyGuard below(autocast_key<device>());
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const bool kept = x.requires_grad() && x.is_leaf();  // its cast, by PyTorch, for all that use it
  const Tensor given = kept ? at::autocast::cached_cast(dtype, x, device) : x;
  const Tensor factor = casted(dtype, weight, device);
  std::optional<Tensor> offset;
  if (bias && bias->defined()) offset = casted(dtype, *bias, device);
  if (factor.scalar_type() == dtype && one_product(given, factor, offset)) {
    std::optional<Tensor> shift;
    if (offset) shift = target(*bias, *offset);
    return Product::apply(given, target(weight, factor), shift, Casts{factor, offset});
  }
  return at::linear(at::autocast::cached_cast(dtype, given, device), factor, offset);
}

template <c10::DeviceType device>
Tensor addmm(const Tensor& bias, const Tensor& x, const Tensor& weight, const at::Scalar& beta, const at::Scalar& alpha) {
  const c10::impl::ExcludeDispatchKeyGuard below(autocast_key<device>());
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const Tensor offset = casted(dtype, bias, device), given = at::autocast::cached_cast(dtype, x, device);
  return at::addmm(offset, given, casted(dtype, weight, device), beta, alpha);
}

template <c10::DeviceType device>
void put() {
  static std::unique_ptr<torch::Library> questions, products;
  if (products) return;
  Silent silent;  // PyTorch warns of whoever stands in the place of a kernel of its own
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  const auto library = [](DispatchKey key) {
    return std::make_unique<torch::Library>(torch::Library::IMPL, "aten", key, "tilebook/native", __LINE__);
  };
  questions = library(kAsked);
  questions->impl("to.dtype", TORCH_FN(asked));
  products = library(device == c10::kCUDA ? DispatchKey::AutocastCUDA : DispatchKey::AutocastCPU);
  products->impl("linear", &linear<device>);
  products->impl("addmm", &addmm<device>);
}

}  // namespace
}  // namespace casts

using namespace casts;

void define_sums(torch::Library& library) {
  library.def("column_sum(Tensor rows, ScalarType dtype) -> Tensor");
  library.impl("column_sum", torch::dispatch(DispatchKey::CompositeExplicitAutograd, TORCH_FN(sum_of_columns)));
}

void* stream_of(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// The signature of cuStreamIsCapturing.
using Capturing = int (*)(void*, int*);

bool captured(c10::Device device) {
  static const auto ask = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    return driver ? reinterpret_cast<Capturing>(dlsym(driver, "cuStreamIsCapturing")) : nullptr;
  }();
  if (!ask || device.is_cpu()) return false;
  int status = 0;
  return ask(stream_of(device), &status) == 0 && status != 0;
}

Tensor casted(at::ScalarType dtype, const Tensor& weight, c10::DeviceType device) {
  std::shared_ptr<Region> region;
  if (casting.load(std::memory_order_relaxed) && (dtype == at::kBFloat16 || dtype == at::kHalf) &&
      eligible(weight, device) && ordinary()) {
    region = region_of(dtype, weight.device());
  }
  if (!region) return at::autocast::cached_cast(dtype, weight, device);
  const c10::impl::IncludeDispatchKeyGuard ours(kAsked);
  return at::autocast::cached_cast(dtype, weight, device);
}

void touched(const Tensor& tensor) {
  if (!known) return;
  auto* const impl = tensor.unsafeGetTensorImpl();
  if (const Tensor input(known->input.lock()); input.unsafeGetTensorImpl() == impl) known->input.reset();
  const auto region = known->region.lock();
  if (!region) return;
  if (const auto there = region->casts.find(impl); there != region->casts.end()) there->second.tensor.reset();
}

void casts_on(bool on, bool cpu) {
  casting = on && aliases_met();
  try {
    if (casting) cpu ? put<c10::kCPU>() : put<c10::kCUDA>();
  } catch (const std::exception&) {
    casting = false;  // a PyTorch that takes no kernels there
  }
}

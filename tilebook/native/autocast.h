// What is asked of PyTorch's autocast. Its own headers, ATen/autocast_mode.h and ATen/CachedTensorUtils.h, declare each
// of PyTorch's ops beside it, which takes longer to compile than the ops that are used here.

#pragma once

#include <ATen/core/Tensor.h>

namespace at::autocast {
TORCH_API bool is_autocast_enabled(at::DeviceType device_type);
TORCH_API bool is_autocast_cache_enabled();
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);
TORCH_API Tensor cached_cast(at::ScalarType to_type, const Tensor& arg, c10::DeviceType device_type);
}  // namespace at::autocast

namespace at::caching {
TORCH_API bool is_cached_tensor(const Tensor& tensor);
}  // namespace at::caching

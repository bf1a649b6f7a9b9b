// A CUDA device that does nothing, so that fake tensors can lie on it in a process without a GPU.
//
// torch asks a device for two things even where no tensor has memory: a guard (current device and stream), which
// autograd uses, and the hooks by which it finds out that CUDA is there. Both are given here. No kernel is registered,
// so that an operation on a tensor that is not fake fails as it would without this file.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

struct FakeGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device device) const override { return device; }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

struct FakeHooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  // A CUDA build of torch asks before it chooses a kernel of attention.
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
};

static_assert(sizeof(FakeHooks) == sizeof(at::CUDAHooksInterface), "hooks are replaced where they lie");

c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new FakeGuard);

}  // namespace

extern "C" void use_fake_cuda() {
  // torch keeps the hooks of its first question for ever, so that only their contents can be replaced.
  auto* held = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  held->~CUDAHooksInterface();
  new (held) FakeHooks;
}

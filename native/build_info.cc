/* What this binary was built from, in every addon: exports.buildInfo gives it to JS, and the exported text can be read from the file
 * even where the addon does not load (`strings addon.node | grep lc_build_info`). */
#include "lctx/build_info.h"
#include <array>
#include <cstdint>
#include "lctx/abi.h"
#ifdef LCTX_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#ifdef __clang__
#define LCTX_COMPILER "clang++ " __clang_version__
#else
#define LCTX_COMPILER "g++ " __VERSION__
#endif

namespace {

struct Text {
  std::array<char, 512> chars{};
  size_t length = 0;
  constexpr Text& operator<<(const char* s) {
    while (*s) chars.at(length++) = *s++;  // too long a text does not compile
    return *this;
  }
  constexpr Text& operator<<(uint32_t n) {
    if (n >= 10) *this << n / 10;
    chars.at(length++) = static_cast<char>('0' + n % 10);
    return *this;
  }
};

constexpr Text text() {
  Text t;
  t << LCTX_BUILD_INFO_MARK "{\"version\":\"" LCTX_VERSION "\",\"abi\":\"" << LCTX_ABI_MAJOR << "." << LCTX_ABI_MINOR << "\",\"napi\":" << uint32_t{NAPI_VERSION}
    << ",\"compiler\":\"" LCTX_COMPILER "\"";
#ifdef LCTX_WITH_CUDA
  t << ",\"cuda\":true,\"cudaTargets\":\"" LCTX_CUDA_TARGETS "\",\"cudaToolkit\":\"" << uint32_t{CUDART_VERSION / 1000} << "."
    << uint32_t{CUDART_VERSION % 1000 / 10} << "\"}";
#else
  t << ",\"cuda\":false}";
#endif
  return t;
}

constexpr Text kText = text();

}  // namespace

extern "C" {
extern __attribute__((visibility("default"))) const std::array<char, kText.length + 1> lc_build_info;
constexpr std::array<char, kText.length + 1> lc_build_info = [] {
  std::array<char, kText.length + 1> out{};
  for (size_t i = 0; i < kText.length; i++) out[i] = kText.chars[i];
  return out;
}();
}

const char* lctx::build_info_json() { return lc_build_info.data() + sizeof(LCTX_BUILD_INFO_MARK) - 1; }

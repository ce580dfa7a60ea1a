/* What an addon was built from. native/build_info.cc is part of every addon. */
#ifndef LCTX_BUILD_INFO_H
#define LCTX_BUILD_INFO_H
#include <napi.h>

/* Begins the exported text `lc_build_info`; JSON follows. */
#define LCTX_BUILD_INFO_MARK "lc_build_info "

namespace lctx {

/* {"version","abi","napi","compiler","cuda"[,"cudaTargets","cudaToolkit"]} */
const char* build_info_json();

inline Napi::Value build_info(Napi::Env env) {
  Napi::Object json = env.Global().Get("JSON").As<Napi::Object>();
  return json.Get("parse").As<Napi::Function>().Call(json, {Napi::String::New(env, build_info_json())});
}

}  // namespace lctx
#endif

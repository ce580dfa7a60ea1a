/**
 * `@lc/tensor`: handles, devices, streams, memory, GEMM and small dense ops that every other `@lc` package composes through.
 * @module @lc/tensor
 */

export type { Block, ExpertLinear, Kept, Layer, LayerState, Linear, Parameter, Pass, Span } from './blocks.js';
export { copy, fill, upload } from './copy.js';
export * from './cuda.js';
export { GLIBC_NEEDED, glibcVersion } from './diagnose.js';
export { type Device, type DeviceLike, type DType, dtypeBytes, type TypedArray } from './dtype.js';
export { LcError, type LcErrorCode, LcTypeError } from './errors.js';
export * from './gemm.js';
export { leaks } from './leaks.js';
export { PlainExpertLinear, PlainLinear } from './linear.js';
export {
  deviceMemory,
  memInfo,
  memory,
  type ProcessMemory,
  processMemory,
  resetPeak,
  setRamLimit,
  setVramLimit,
} from './memory.js';
export {
  type BuildInfo,
  buildInfo,
  type CounterSnapshot,
  type DeviceMemory,
  type Handle,
  loadAddon,
  type MemInfo,
  numThreads,
} from './native.js';
export * as reference from './reference.js';
export * from './rowops.js';
export { Scope } from './scope.js';
export {
  dlpackPointer,
  type EmptyOptions,
  empty,
  emptyLike,
  fromDLPack,
  fromPointer,
  fromTypedArray,
  type PointerOptions,
  pointerOf,
  Tensor,
  toDLPack,
  zeros,
} from './tensor.js';
export { type CallTracer, traceCalls } from './typed-addon.js';
export { type Mark, Workspace, type WorkspaceOptions } from './workspace.js';

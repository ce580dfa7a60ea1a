/** `@lc/tensor`: handles, devices, streams, memory, GEMM and small dense ops that every other `@lc` package composes through. */
export { LcError, LcTypeError, type LcErrorCode } from './errors.js';
export { type DType, type Device, type DeviceLike, type TypedArray, dtypeBytes } from './dtype.js';
export {
  type EmptyOptions,
  type PointerOptions,
  Tensor,
  dlpackPointer,
  empty,
  emptyLike,
  fromDLPack,
  fromPointer,
  fromTypedArray,
  pointerOf,
  toDLPack,
  zeros,
} from './tensor.js';
export { copy, fill } from './copy.js';
export { deviceMemory, memInfo, memory, resetPeak } from './memory.js';
export { leaks } from './leaks.js';
export { Scope } from './scope.js';
export { type Mark, Workspace, type WorkspaceOptions } from './workspace.js';
export type { Block, ExpertLinear, Layer, LayerState, Linear, Parameter, Pass, Span } from './blocks.js';
export { PlainExpertLinear, PlainLinear } from './linear.js';
export * from './gemm.js';
export * from './rowops.js';
export * from './cuda.js';
export * as reference from './reference.js';
export {
  type BuildInfo,
  type CounterSnapshot,
  type DeviceMemory,
  type Handle,
  type MemInfo,
  buildInfo,
  loadAddon,
  numThreads,
} from './native.js';

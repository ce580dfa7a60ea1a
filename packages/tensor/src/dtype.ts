import { LcTypeError } from './errors.js';

/** Element types. bf16 and f16 are bits in a Uint16Array on the JavaScript side, i64 a BigInt64Array. */
export type DType = 'f32' | 'bf16' | 'f16' | 'i32' | 'i64' | 'u8';
/** Arrays that tensors are made over and read into: of f32, bf16 or f16 bits, i32, i64, u8. */
export type TypedArray = Float32Array | Uint16Array | Int32Array | BigInt64Array | Uint8Array;
/** `host` is pinned memory where CUDA is, plain memory otherwise; it is counted apart from `cpu`. */
export type Device = 'cpu' | 'host' | `cuda:${number}`;

/** Codes as in native/include/lctx/abi.h (lctx_dtype). */
export const dtypeCode: Record<DType, number> = { f32: 0, bf16: 1, f16: 2, i32: 3, i64: 4, u8: 5 };
export const dtypeOfCode: readonly DType[] = ['f32', 'bf16', 'f16', 'i32', 'i64', 'u8'];
/** Bytes of one element. */
export const dtypeBytes: Record<DType, number> = { f32: 4, bf16: 2, f16: 2, i32: 4, i64: 8, u8: 1 };

const views = { f32: Float32Array, bf16: Uint16Array, f16: Uint16Array, i32: Int32Array, i64: BigInt64Array, u8: Uint8Array } as const;

/** A typed array over a part of a buffer; bf16 and f16 as their bits. */
export function arrayOver(dtype: DType, buffer: ArrayBuffer, byteOffset: number, length: number): TypedArray {
  return new views[dtype](buffer, byteOffset, length);
}

/** The dtype that a typed array holds by default, or undefined. */
export function dtypeOfArray(array: unknown): DType | undefined {
  if (array instanceof Float32Array) return 'f32';
  if (array instanceof Int32Array) return 'i32';
  if (array instanceof BigInt64Array) return 'i64';
  if (array instanceof Uint8Array) return 'u8';
  return undefined;
}

/** 'cuda' means 'cuda:0'. */
export type DeviceLike = Device | 'cuda';

/** Codes as in DLPack. */
export function parseDevice(device: DeviceLike): { device: Device; type: 1 | 2 | 3; id: number } {
  if (device === 'cpu') return { device, type: 1, id: 0 };
  if (device === 'host') return { device, type: 3, id: 0 };
  const match = /^cuda(?::(\d{1,3}))?$/.exec(device);
  if (!match) throw new LcTypeError('ERR_LC_DEVICE', `device: expected 'cpu', 'host', 'cuda' or 'cuda:N', got ${JSON.stringify(device)}`);
  const id = Number(match[1] ?? 0);
  return { device: `cuda:${id}`, type: 2, id };
}

export function deviceOfCode(type: number, id: number): Device {
  return type === 2 ? `cuda:${id}` : type === 3 ? 'host' : 'cpu';
}

/** Checks of arguments, and how much workspace a call takes. Pure TypeScript but for the scratch sizes, which the kernels define. */
import { LcTypeError, numThreads, type Tensor } from '@lc/tensor';
import { native } from './native.js';

/** What a call will look like, for `attentionWorkspaceBytes`. */
export interface AttentionShape {
  /** Queries in the chunk, n. */
  tokens: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  /** Index of the chunk's first query in the prefix. */
  start: number;
  /** Default: no window. */
  window?: number | null;
  /** Where it runs. Default 'cpu'. */
  device?: 'cpu' | 'cuda';
  /** As for `attentionBackward`: false takes more scratch on a GPU. Default true. */
  deterministic?: boolean;
}

const MAX_SEGMENTS = 8;
const KEYS_PER_SEGMENT = 512;
const ALIGN = 256;
/** native/cuda_kernels.h, kMaxDim. */
const MAX_CUDA_DIM = 256;
/** native/cuda_kernels.h, kSinkParts. */
export const SINK_PARTS = 128;

/**
 * Key ranges that the backward pass works on in parallel, each adding to its own copy of dQ. From shapes alone, never from the machine: the number
 * and order of additions must not change with the number of threads. 16 units (K/V heads x ranges) keep 16 threads busy.
 */
export function backwardSegments(shape: AttentionShape): number {
  const keys = Math.min(shape.start + shape.tokens, shape.window ? shape.tokens + shape.window - 1 : Number.POSITIVE_INFINITY);
  return Math.max(1, Math.min(MAX_SEGMENTS, Math.ceil(16 / shape.kvHeads), Math.floor(keys / KEYS_PER_SEGMENT)));
}

const scratchOf = new Map<number, { forward: number; backward: number }>();
/** f32 elements of scratch per thread. */
export function scratchFloats(headDim: number): { forward: number; backward: number } {
  let found = scratchOf.get(headDim);
  if (!found) {
    found = native().scratch({ headDim });
    scratchOf.set(headDim, found);
  }
  return found;
}

/** native/backward_fused.cu: rows of a tile, and the widest head that it takes. */
const FUSED_ROWS = 64;
const FUSED_DIM = 64;

/**
 * f32 elements that a backward pass in no fixed order sums dQ in, on a GPU: [n, heads, headDim], tokens and head dim rounded up to tiles. 0: the pass is
 * deterministic anyway (windowed layers and wide heads, where the fused kernel gains nothing).
 */
export function dqSumFloats(shape: AttentionShape): number {
  const { tokens, heads, kvHeads, headDim, window, deterministic = true } = shape;
  if (deterministic || window || headDim > FUSED_DIM) return 0;
  return kvHeads * Math.ceil((tokens * heads) / kvHeads / FUSED_ROWS) * FUSED_ROWS * Math.ceil(headDim / 32) * 32;
}

/** native/hopper_backward.cu: the widest head that it takes. */
const HOPPER_DIM = 128;

/** native/hopper_backward_window.cu, hopper_backward_window_takes: few keys are seen, so that dQ is complete in registers. */
function shortOnHopper({ tokens, heads, kvHeads, headDim, start, window }: AttentionShape): boolean {
  return headDim <= 64 && heads / kvHeads <= 64 && Math.min(window || Number.POSITIVE_INFINITY, start + tokens) <= 129;
}

/**
 * f32 elements of scratch that the backward pass of Hopper cards takes (native/hopper_backward.cu, hopper_backward_floats): dQ in f32, rows of lse and
 * delta by head, turns. 0: the pass runs on other kernels, or on the one of short windows.
 */
export function hopperFloats(shape: AttentionShape, card = native().hopper()): number {
  const { tokens, heads, headDim } = shape;
  if (card === false || headDim > HOPPER_DIM || shortOnHopper(shape)) return 0;
  const [queries, dims] = headDim <= 64 ? [128, 64] : [64, 128]; // of a tile
  const tiles = Math.ceil(tokens / queries);
  return heads * tiles * queries * (dims + 2) + Math.ceil(tiles / 4) * 4 + heads * tiles + 1;
}

const bytes = (floats: number): number => Math.ceil((floats * 4) / ALIGN) * ALIGN;

/** Bytes that `attentionForward` and `attentionBackward` take from the workspace and give back: O(chunk), whatever the length of the prefix. */
export function attentionWorkspaceBytes(shape: AttentionShape): { forward: number; backward: number } {
  const rows = shape.tokens * shape.heads;
  if (shape.device === 'cuda') {
    const card = native().hopper();
    const hopper = hopperFloats(shape, card);
    const portable = card && hopper > 0 ? 0 : dqSumFloats(shape); // no card to ask: the most that any takes
    return { forward: 0, backward: bytes(rows) + bytes(SINK_PARTS * shape.heads) + bytes(Math.max(hopper, portable)) };
  }
  const scratch = scratchFloats(shape.headDim);
  const threads = numThreads();
  const segments = backwardSegments(shape);
  return {
    forward: bytes(scratch.forward * threads),
    backward: bytes(scratch.backward * threads) + bytes(rows) + (segments > 1 ? bytes((segments - 1) * rows * shape.headDim) : 0),
  };
}

interface Checked {
  q: Tensor;
  k: Tensor;
  v: Tensor;
  lse: Tensor;
  start: number;
  window?: number | null;
  sinks?: Tensor | null;
  docStart?: Tensor | null;
  scale?: number;
}

const same = (a: readonly number[], b: readonly number[]): boolean => a.length === b.length && a.every((size, i) => size === b[i]);

/** True on a GPU, where activations are bf16. */
export const isCuda = (t: Tensor): boolean => t.device.startsWith('cuda');

/** Throws unless `t` lies where `like` does. */
export function expectDevice(op: string, name: string, t: Tensor | null | undefined, like: Tensor): void {
  if (t && isCuda(t) !== isCuda(like)) {
    throw new LcTypeError('ERR_LC_DEVICE', `${op}: ${name} must be on ${like.device} like q, got ${t} on ${t.device}; move it with copy`);
  }
}

/** Throws unless `t` is f32 (or `dtype`) of this shape. */
export function expectTensor(op: string, name: string, t: Tensor, shape: readonly number[], dtype = 'f32'): void {
  if (t?.dtype !== dtype) throw new LcTypeError('ERR_LC_DTYPE', `${op}: ${name} must be ${dtype}[${shape.join(',')}], got ${t}`);
  if (!same(t.shape, shape)) throw new LcTypeError('ERR_LC_SHAPE', `${op}: ${name} must be ${dtype}[${shape.join(',')}], got ${t}`);
}

/** Throws unless `start` is a valid index. */
export function expectStart(op: string, start: number, tokens: number): void {
  if (!Number.isInteger(start) || start < 0 || start + tokens > 0x7fffffff) {
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: start must be an integer from 0 (start + n at most 2^31 - 1), got ${start}`);
  }
}

/** Checks what both passes share; returns the shape, and window and scale as the kernels take them. */
export function checkAttention(op: string, args: Checked): { shape: AttentionShape; window: number; scale: number } {
  const { q, k, v, start } = args;
  const [dtype, where] = isCuda(q) ? ['bf16', 'a GPU'] : ['f32', 'the CPU'];
  for (const [name, t] of Object.entries({ q, k, v })) {
    if (t.dtype !== dtype)
      throw new LcTypeError('ERR_LC_DTYPE', `${op}: ${name} must be ${dtype} on ${where}, got ${t}; cast it with copy`);
    if (t.shape.length !== 3) throw new LcTypeError('ERR_LC_SHAPE', `${op}: ${name} must be [tokens, heads, headDim], got ${t}`);
  }
  const [tokens, heads, headDim] = q.shape as [number, number, number];
  const [keys, kvHeads] = k.shape as [number, number, number];
  expectTensor(op, 'k', k, [keys, kvHeads, headDim], dtype);
  expectTensor(op, 'v', v, k.shape, dtype);
  if (headDim < 1 || kvHeads < 1 || heads < 1 || heads % kvHeads !== 0) {
    throw new LcTypeError(
      'ERR_LC_SHAPE',
      `${op}: the heads of q (${heads}) must be a multiple of those of k and v (${kvHeads}), and headDim positive; got q ${q}, k ${k}`,
    );
  }
  expectStart(op, start, tokens);
  if (start + tokens > keys) {
    throw new LcTypeError(
      'ERR_LC_SHAPE',
      `${op}: queries ${start}..${start + tokens} need as many keys, but k holds ${keys}; pass the prefix with the chunk's own keys`,
    );
  }
  for (const [name, t] of Object.entries({ k, v, lse: args.lse, sinks: args.sinks, docStart: args.docStart })) expectDevice(op, name, t, q);
  expectTensor(op, 'lse', args.lse, [tokens, heads]);
  if (args.sinks) expectTensor(op, 'sinks', args.sinks, [heads]);
  if (args.docStart) expectTensor(op, 'docStart', args.docStart, [tokens], 'i32');
  const window = args.window ?? 0;
  if (args.window != null && (!Number.isInteger(window) || window < 1)) {
    throw new LcTypeError(
      'ERR_LC_ARGUMENT',
      `${op}: window must be a positive integer (keys that a query sees, itself included) or null, got ${args.window}`,
    );
  }
  if (isCuda(q) && (headDim % 8 !== 0 || headDim > MAX_CUDA_DIM)) {
    throw new LcTypeError(
      'ERR_LC_SHAPE',
      `${op}: headDim on a GPU must be a multiple of 8 up to ${MAX_CUDA_DIM}, got ${headDim}; pad the heads with zeros, or use the CPU`,
    );
  }
  const scale = args.scale ?? 1 / Math.sqrt(headDim);
  if (!Number.isFinite(scale)) throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: scale must be finite, got ${scale}`);
  return { shape: { tokens, heads, kvHeads, headDim, start, window: args.window ?? null }, window, scale };
}

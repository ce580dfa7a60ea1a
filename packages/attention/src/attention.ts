import { LcTypeError, numThreads, type Tensor, type Workspace } from '@lc/tensor';
import { native } from './native.js';
import {
  backwardSegments,
  checkAttention,
  dqSumFloats,
  expectDevice,
  expectTensor,
  hopperFloats,
  isCuda,
  SINK_PARTS,
  scratchFloats,
} from './plan.js';

/**
 * What both passes take. Rows (dimension 0) of q, k, v, out and their gradients may be strided: slices of a fused projection.
 * Activations are f32 on the CPU and bf16 on a GPU, where head dims are multiples of 8 up to 256 and bf16 rows begin at multiples of 16 bytes.
 */
export interface AttentionArgs {
  /** f32 (bf16 on a GPU) [n, heads, headDim], rotated already. */
  q: Tensor;
  /** f32 (bf16 on a GPU) [T, kvHeads, headDim], T >= start + n; query head h reads K/V head floor(h / (heads / kvHeads)). */
  k: Tensor;
  /** f32 (bf16 on a GPU) [T, kvHeads, headDim]. */
  v: Tensor;
  /** f32 (bf16 on a GPU) [n, heads, headDim]. */
  out: Tensor;
  /** f32 [n, heads], contiguous: natural log of the softmax denominator, sink included. */
  lse: Tensor;
  /** Index of the chunk's first query in the prefix: query i sees keys up to and including start + i. */
  start: number;
  /** Keys that a query sees at most, itself included; null: all. */
  window?: number | null;
  /** f32 [heads]: a logit per head that joins the softmax denominator and carries no value (gpt-oss). */
  sinks?: Tensor | null;
  /**
   * i32 [n], contiguous: index, in the whole sequence, of the first token of each query's document. Non-decreasing; null: one document from 0.
   * On a GPU nothing looks at its values beforehand: wrong ones give wrong results.
   */
  docStart?: Tensor | null;
  /** Default 1 / sqrt(headDim). */
  scale?: number;
  /** Scratch is taken from it and given back. */
  ws: Workspace;
}

/**
 * Exact softmax attention of a chunk of queries over all keys before them: writes `out` and `lse`. Works tile by tile with an online softmax
 * (FlashAttention, Dao et al. 2022): no score matrix and no mask is ever stored, and tiles outside the window or the document are not visited.
 * The same call gives the same bits, whatever the number of threads.
 *
 * @throws LcTypeError ERR_LC_SHAPE, ERR_LC_DTYPE, ERR_LC_STRIDES, ERR_LC_DEVICE, ERR_LC_ARGUMENT (window, scale, docStart)
 */
export function attentionForward(args: AttentionArgs): void {
  const op = 'attentionForward';
  const { shape, window, scale } = checkAttention(op, args);
  const { q, k, v, out, lse, start, ws } = args;
  expectTensor(op, 'out', out, q.shape, q.dtype);
  expectDevice(op, 'out', out, q);
  if (shape.tokens === 0) return;
  const mark = ws.mark();
  try {
    const slots = isCuda(q) ? 0 : numThreads();
    const scratch = slots > 0 ? ws.alloc([slots * scratchFloats(shape.headDim).forward], 'f32') : null;
    native().forward({
      q,
      k,
      v,
      out,
      lse,
      start,
      window,
      scale,
      sinks: args.sinks ?? null,
      docStart: args.docStart ?? null,
      scratch,
      slots,
      stream: ws.stream,
    });
  } finally {
    ws.reset(mark);
  }
}

export interface AttentionBackwardArgs extends AttentionArgs {
  /** f32 (bf16 on a GPU) [n, heads, headDim]: d(loss) / d(out). */
  dout: Tensor;
  /** f32 (bf16 on a GPU) [n, heads, headDim]: overwritten. May not overlap q, out or dout. */
  dq: Tensor;
  /** f32 [T, kvHeads, headDim]: added to. */
  dk: Tensor;
  /** f32 [T, kvHeads, headDim]: added to. */
  dv: Tensor;
  /** f32 [heads]: added to. Needs `sinks`. */
  dSinks?: Tensor | null;
  /**
   * Default true: the same bits every time. False: on a GPU, full attention at head dims up to 64 (on Hopper cards up to 128) sums dQ in no
   * fixed order, which is faster and takes f32 scratch for all of dQ (`attentionWorkspaceBytes`; Hopper cards take it either way); dQ then differs from run
   * to run by the rounding of f32 sums; dK, dV and dSinks do not.
   */
  deterministic?: boolean;
}

/**
 * Gradients of `attentionForward`, from its `out` and `lse` and the same other arguments. Probabilities are recomputed tile by tile
 * (FlashAttention-2, Dao 2023); with sinks the same formulas hold for the out and lse that include them, and
 * dSinks[h] = -sum over queries of exp(sinks[h] - lse) * rowsum(dout * out). The same call gives the same bits, whatever the number of threads, unless `deterministic` is false.
 *
 * Adds into dk and dv of keys 0 .. start + n, so a sequence's gradient is complete when every chunk has been through here, in any order.
 * @throws as attentionForward
 */
export function attentionBackward(args: AttentionBackwardArgs): void {
  const op = 'attentionBackward';
  const { shape, window, scale } = checkAttention(op, args);
  const { q, k, v, out, lse, dout, dq, dk, dv, start, ws } = args;
  for (const [name, t] of Object.entries({ out, dout, dq })) expectTensor(op, name, t, q.shape, q.dtype);
  for (const [name, t] of Object.entries({ dk, dv })) expectTensor(op, name, t, k.shape);
  for (const [name, t] of Object.entries({ out, dout, dq, dk, dv, dSinks: args.dSinks })) expectDevice(op, name, t, q);
  if (args.dSinks) {
    if (!args.sinks) throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: dSinks was given without sinks; pass the sinks of the forward pass`);
    expectTensor(op, 'dSinks', args.dSinks, [shape.heads]);
  }
  if (shape.tokens === 0) return;
  const mark = ws.mark();
  try {
    const rows = shape.tokens * shape.heads;
    const common = {
      ...{ q, k, v, out, lse, start, window, scale, sinks: args.sinks ?? null, docStart: args.docStart ?? null },
      ...{ dout, dq, dk, dv, dSinks: args.dSinks ?? null },
      delta: ws.alloc([rows], 'f32'),
      stream: ws.stream,
    };
    if (isCuda(q)) {
      const partial = args.dSinks ? ws.alloc([SINK_PARTS * shape.heads], 'f32') : null;
      const sum = dqSumFloats({ ...shape, deterministic: args.deterministic ?? true });
      const hopper = hopperFloats(shape);
      native().backward({
        ...{ ...common, scratch: null, slots: 0, partial, segments: 0 },
        hopper: hopper > 0 ? ws.alloc([hopper], 'f32') : null,
        dqSum: hopper === 0 && sum > 0 ? ws.alloc([sum], 'f32') : null,
        anyOrder: args.deterministic === false,
      });
      return;
    }
    const slots = numThreads();
    const segments = backwardSegments(shape);
    native().backward({
      ...common,
      scratch: ws.alloc([slots * scratchFloats(shape.headDim).backward], 'f32'),
      slots,
      partial: segments > 1 ? ws.alloc([(segments - 1) * rows * shape.headDim], 'f32') : null,
      segments,
    });
  } finally {
    ws.reset(mark);
  }
}

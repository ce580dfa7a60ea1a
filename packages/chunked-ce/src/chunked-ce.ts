import {
  copy,
  type DType,
  dtypeBytes,
  fill,
  fromTypedArray,
  gemm,
  LcError,
  LcTypeError,
  sumRows,
  type Tensor,
  upload,
  type Workspace,
} from '@lc/tensor';
import { checkArguments, supervisedRows } from './check.js';
import { native } from './native.js';
import { type ChunkSize, type CrossEntropyOptions, checkOptions, chunkRows } from './plan.js';

/** Arguments of `chunkedCrossEntropy`; n rows, one device. */
export interface ChunkedCrossEntropyArgs extends CrossEntropyOptions {
  /** [n, hidden]; the input of the LM head. */
  hidden: Tensor;
  /** [vocab, hidden]. */
  weight: Tensor;
  /** [vocab] or null. */
  bias?: Tensor | null;
  /** i32 [n] on the CPU or host, aligned with `hidden` (see `shiftLabels`): row i is scored against labels[i]. */
  labels: Tensor;
  /** f32 [n] on the CPU or host: weight of each token's loss, finite. Default 1. */
  tokenWeights?: Tensor | null;
  /**
   * What the loss is divided by: supervised tokens of the whole optimizer step, so that accumulation adds up. Default: those of this call. 0 is
   * accepted where every label is ignored.
   */
  numTokens?: number;
  /** Default 'auto'. It decides memory and speed, and results up to rounding: fix it where two runs must give the same bits. */
  chunk?: ChunkSize;
  /** `[n, hidden]`, gets d(loss)/d(hidden), 0 in ignored rows. May be `hidden` itself, which is then overwritten, but not overlap it otherwise. */
  dHidden?: Tensor | null;
  /** f32 [vocab, hidden]: added to. */
  dWeight?: Tensor | null;
  /** f32 [vocab]: added to. */
  dBias?: Tensor | null;
  /**
   * f32 [2] on the device: the undivided loss is added to its high and low part (`readLossSum` reads it). On a GPU nothing then waits for the device,
   * and the `loss` that is returned is NaN; on the CPU it is returned as well.
   */
  lossSum?: Tensor | null;
  /** f32 [n]: gets each token's weighted loss, not divided; 0 where ignored. */
  lossPerToken?: Tensor | null;
  ws: Workspace;
}

/** Loss, and what was done for it. */
export interface ChunkedCrossEntropyResult {
  /** Sum of the tokens' losses / numTokens; 0 when every label is ignored. */
  readonly loss: number;
  /** Labels that are not ignored. */
  readonly supervised: number;
  /** Rows that went through the LM head: ignored rows cost no GEMM. */
  readonly gemmRows: number;
  /** Rows of logits that were alive at once. */
  readonly chunkRows: number;
}

/** Values of an f32 tensor, wherever it lies; waits for the device. A copy, because `data()` cannot look into an allocation of more than 4 GiB. */
function readBack(t: Tensor): Float32Array {
  const values = new Float32Array(t.numel);
  using host = fromTypedArray(values, t.shape, { label: 'loss' });
  copy(host, t);
  return values;
}

/** The loss in a `lossSum`, waiting for the device. */
export function readLossSum(sum: Tensor): number {
  const [high, low] = readBack(sum) as unknown as [number, number];
  return high + low;
}

function addToLossSum(sum: Tensor, loss: number): void {
  const total = readLossSum(sum) + loss;
  upload(sum, Float32Array.of(total, total - Math.fround(total)));
}

/**
 * LM head and cross-entropy, chunk by chunk: logits of at most `chunk` tokens exist at a time, and the gradient is taken while they do. The idea of
 * Liger's fused linear cross-entropy (2024) and of Unsloth's chunked loss: for a frozen head only d(hidden) is kept, and it may overwrite `hidden`.
 *
 * Extra memory: chunk x (vocab + 2 hidden) x 4 bytes from `ws`, instead of n x vocab for logits and as much again for their gradient.
 *
 * @throws ERR_LC_SHAPE, ERR_LC_DTYPE, ERR_LC_DEVICE; ERR_LC_ARGUMENT for a label outside the vocabulary or a token weight that is not finite (the row
 * is named), and for options out of range; ERR_LC_OUT_OF_MEMORY. Everything is checked and taken before anything is written
 */
export function chunkedCrossEntropy(args: ChunkedCrossEntropyArgs): ChunkedCrossEntropyResult {
  const { n, width, vocab } = checkArguments(args);
  const { hidden, weight, bias = null, dHidden = null, dWeight = null, dBias = null, lossPerToken = null, lossSum = null, ws } = args;
  const options = {
    ignoreIndex: args.ignoreIndex ?? -100,
    labelSmoothing: args.labelSmoothing ?? 0,
    zLoss: args.zLoss ?? 0,
    softCap: args.softCap ?? 0,
    logitScale: args.logitScale ?? 1,
  };
  checkOptions(options);
  const label = args.labels.data<Int32Array>();
  const weights = args.tokenWeights?.data<Float32Array>();
  const rows = supervisedRows(label, weights, options.ignoreIndex, vocab);
  const supervised = rows.length;
  const numTokens = countTokens(args.numTokens, supervised);
  const wanted = chunkRows(args.chunk ?? 'auto', Math.max(1, supervised), vocab, width, hidden.device);
  if (supervised === 0) {
    if (lossPerToken) fill(lossPerToken, 0);
    if (dHidden) fill(dHidden, 0);
    return { loss: 0, supervised, gemmRows: 0, chunkRows: wanted };
  }

  const onGpu = hidden.device.startsWith('cuda');
  const gradient = dHidden !== null || dWeight !== null || dBias !== null;
  const shape = { vocab, width, gradient: dHidden !== null, weighted: weights !== undefined };
  return ws.scoped(() => {
    const scratch = takeScratch(ws, wanted, shape, args.chunk ?? 'auto');
    const { chunkSize, logits, gathered, dGathered, index, target, rowLoss, rowWeight } = scratch;
    // On a GPU the gradient takes the first half of each row of logits, as bf16: what the next GEMM wants.
    const dLogits = onGpu ? logits.reinterpret('bf16', [chunkSize, 2 * vocab]).slice(1, 0, vocab) : logits;
    const sum = onGpu ? (lossSum ?? ws.zeros([2], 'f32')) : null;
    if (lossPerToken) fill(lossPerToken, 0);
    let loss = 0; // f64, in token order
    let cleared = 0; // rows of dHidden that are done, one way or the other
    for (let at = 0; at < supervised; at += chunkSize) {
      const m = Math.min(chunkSize, supervised - at);
      const part = rows.subarray(at, at + m);
      const [first, last] = [part[0] as number, part[m - 1] as number];
      const dense = last - first + 1 === m; // nothing is ignored in between: no gather needed
      const z = logits.rows(0, m);
      const dz = dLogits.rows(0, m);
      const ids = index.rows(0, m);
      const targets = part.map((row) => label[row] as number);
      upload(ids, part);
      upload(target.rows(0, m), targets);
      if (rowWeight && weights) {
        const values = Float32Array.from(part, (row) => weights[row] as number);
        upload(rowWeight.rows(0, m), values);
      }
      let h: Tensor;
      if (dense) h = hidden.rows(first, m);
      else {
        h = gathered.rows(0, m);
        native().gatherRows({ src: hidden, dst: h, index: ids });
      }
      gemm({ a: h, b: weight, c: z, transB: true });
      native().crossEntropyRows({
        logits: z,
        labels: target.rows(0, m),
        loss: rowLoss.rows(0, m),
        bias,
        weights: rowWeight ? rowWeight.rows(0, m) : null,
        ...options,
        inverseTokens: 1 / numTokens,
        gradient,
        sum,
      });
      if (!onGpu) for (const value of readBack(rowLoss.rows(0, m))) loss += value;
      if (lossPerToken) native().scatterRows({ src: rowLoss.rows(0, m).view([m, 1]), dst: lossPerToken.view([n, 1]), index: ids });
      if (dWeight) gemm({ a: dz, b: h, c: dWeight, transA: true, beta: 1 });
      if (dBias) sumRows({ x: dz, out: dBias, accumulate: true });
      if (dHidden) {
        // Only rows up to `last` are written, and later chunks read only rows after it: dHidden may be hidden.
        if (dense) {
          if (first > cleared) fill(dHidden.rows(cleared, first - cleared), 0);
          gemm({ a: dz, b: weight, c: dHidden.rows(first, m) });
        } else if (dGathered) {
          gemm({ a: dz, b: weight, c: dGathered.rows(0, m) });
          fill(dHidden.rows(cleared, last + 1 - cleared), 0);
          native().scatterRows({ src: dGathered.rows(0, m), dst: dHidden, index: ids });
        }
        cleared = last + 1;
      }
    }
    if (dHidden && cleared < n) fill(dHidden.rows(cleared, n - cleared), 0);
    if (sum) loss = lossSum ? Number.NaN : readLossSum(sum);
    else if (lossSum) addToLossSum(lossSum, loss);
    return { loss: loss / numTokens, supervised, gemmRows: supervised, chunkRows: chunkSize };
  });
}

function countTokens(given: number | undefined, supervised: number): number {
  if (given === undefined || (given === 0 && supervised === 0)) return Math.max(1, supervised);
  if (given > 0 && Number.isFinite(given)) return given;
  throw new LcTypeError(
    'ERR_LC_ARGUMENT',
    `chunkedCrossEntropy: numTokens must be the count of supervised tokens of the whole step, > 0, got ${String(given)}`,
  );
}

interface Scratch {
  chunkSize: number;
  logits: Tensor;
  gathered: Tensor;
  dGathered: Tensor | null;
  index: Tensor;
  target: Tensor;
  rowLoss: Tensor;
  rowWeight: Tensor | null;
}

/**
 * All scratch of a call, in one piece, so that a growing workspace takes no more than that. Nothing is computed before it is taken: under 'auto' a
 * workspace that is too small only means smaller chunks.
 */
function takeScratch(
  ws: Workspace,
  wanted: number,
  { vocab, width, gradient, weighted }: { vocab: number; width: number; gradient: boolean; weighted: boolean },
  chunk: ChunkSize,
): Scratch {
  for (let rows = wanted; ; rows = Math.ceil(rows / 2)) {
    const parts: [number[], DType][] = [
      [[rows, vocab], 'f32'],
      [[rows, width], ws.dtype],
      [[gradient ? rows : 0, width], ws.dtype],
      [[rows], 'i32'],
      [[rows], 'i32'],
      [[rows], 'f32'],
      [[weighted ? rows : 0], 'f32'],
    ];
    const sizes = parts.map(([shape, dtype]) => Math.ceil((shape.reduce((a, b) => a * b, 1) * dtypeBytes[dtype]) / 256) * 256);
    let block: Tensor;
    try {
      const total = sizes.reduce((a, b) => a + b, 0);
      block = ws.alloc([total], 'u8');
    } catch (error) {
      if (chunk === 'auto' && rows > 1 && error instanceof LcError && error.code === 'ERR_LC_OUT_OF_MEMORY') continue;
      throw error;
    }
    let offset = 0;
    const [logits, gathered, dGathered, index, target, rowLoss, rowWeight] = parts.map(([shape, dtype], i) => {
      const size = shape.reduce((a, b) => a * b, 1) * dtypeBytes[dtype];
      const part = block.slice(0, offset, size).reinterpret(dtype, shape);
      offset += sizes[i] as number;
      return part;
    }) as [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor];
    return {
      ...{ chunkSize: rows, logits, gathered, index, target, rowLoss },
      dGathered: gradient ? dGathered : null,
      rowWeight: weighted ? rowWeight : null,
    };
  }
}

import { copy, empty, fill, gemm, LcTypeError, sumRows, type Tensor, upload, type Workspace } from '@lc/tensor';
import { native } from './native.js';
import { type ChunkSize, type CrossEntropyOptions, checkOptions, chunkRows } from './plan.js';

export interface ChunkedCrossEntropyArgs extends CrossEntropyOptions {
  /** [n, hidden]; the input of the LM head. */
  hidden: Tensor;
  /** [vocab, hidden]. */
  weight: Tensor;
  /** [vocab] or null. */
  bias?: Tensor | null;
  /** i32 [n] on the CPU or host, aligned with `hidden` (see `shiftLabels`): row i is scored against labels[i]. */
  labels: Tensor;
  /** f32 [n]: weight of each token's loss. Default 1. */
  tokenWeights?: Tensor | null;
  /** What the loss is divided by: supervised tokens of the whole optimizer step, so that accumulation adds up. Default: those of this call. */
  numTokens?: number;
  /** Default 'auto'. */
  chunk?: ChunkSize;
  /** [n, hidden]: gets d(loss)/d(hidden). May be `hidden` itself, which is then overwritten. */
  dHidden?: Tensor | null;
  /** f32 [vocab, hidden]: added to. */
  dWeight?: Tensor | null;
  /** f32 [vocab]: added to. */
  dBias?: Tensor | null;
  /** On a GPU, f32 [2] there: the undivided loss is added to it as high and low part (`readLossSum`), so that nothing waits. Then `loss` is NaN. */
  lossSum?: Tensor | null;
  /** f32 [n]: gets each token's weighted loss, not divided; 0 where ignored. */
  lossPerToken?: Tensor | null;
  ws: Workspace;
}

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

/** The loss in a `lossSum`, waiting for the device. */
export function readLossSum(sum: Tensor): number {
  using host = empty([2], { label: 'loss' });
  copy(host, sum);
  const [high, low] = host.data() as unknown as [number, number];
  return high + low;
}

function check(args: ChunkedCrossEntropyArgs): { n: number; hidden: number; vocab: number } {
  const { hidden, weight, bias, labels, tokenWeights, dHidden, dWeight, dBias, lossPerToken } = args;
  const fail = (name: string, want: string, got: Tensor): never => {
    throw new LcTypeError('ERR_LC_SHAPE', `chunkedCrossEntropy: ${name} must be ${want}, got ${got}`);
  };
  if (hidden.shape.length !== 2) fail('hidden', '[n, hidden]', hidden);
  const [n, width] = hidden.shape as [number, number];
  if (weight.shape.length !== 2 || weight.shape[1] !== width || weight.shape[0] === 0) fail('weight', `[vocab, ${width}]`, weight);
  const vocab = weight.shape[0] as number;
  const same = (t: Tensor, shape: readonly number[]): boolean => t.shape.length === shape.length && shape.every((s, i) => s === t.shape[i]);
  if (labels.dtype !== 'i32' || !same(labels, [n])) fail('labels', `i32[${n}]`, labels);
  if (bias && !same(bias, [vocab])) fail('bias', `[${vocab}]`, bias);
  for (const [name, t] of [
    ['tokenWeights', tokenWeights],
    ['lossPerToken', lossPerToken],
  ] as const)
    if (t && !same(t, [n])) fail(name, `f32[${n}]`, t);
  if (dHidden && !same(dHidden, [n, width])) fail('dHidden', `[${n}, ${width}]`, dHidden);
  if (dWeight && !same(dWeight, [vocab, width])) fail('dWeight', `f32[${vocab}, ${width}]`, dWeight);
  if (dBias && !same(dBias, [vocab])) fail('dBias', `f32[${vocab}]`, dBias);
  return { n, hidden: width, vocab };
}

/**
 * LM head and cross-entropy, chunk by chunk: logits of at most `chunk` tokens exist at a time, and the gradient is taken while they do. The idea of
 * Liger's fused linear cross-entropy (2024) and of Unsloth's chunked loss: for a frozen head only d(hidden) is kept, and it may overwrite `hidden`.
 *
 * Extra memory: chunk x (vocab + 2 hidden) x 4 bytes from `ws`, instead of n x vocab for logits and as much again for their gradient.
 *
 * @throws ERR_LC_SHAPE, ERR_LC_DTYPE; ERR_LC_ARGUMENT for a label outside the vocabulary (its row is named) and for options out of range
 */
export function chunkedCrossEntropy(args: ChunkedCrossEntropyArgs): ChunkedCrossEntropyResult {
  const { n, hidden: width, vocab } = check(args);
  const {
    hidden,
    weight,
    bias = null,
    labels,
    tokenWeights = null,
    dHidden = null,
    dWeight = null,
    dBias = null,
    lossPerToken = null,
    lossSum = null,
    ws,
    chunk = 'auto',
  } = args;
  const options = {
    ignoreIndex: args.ignoreIndex ?? -100,
    labelSmoothing: args.labelSmoothing ?? 0,
    zLoss: args.zLoss ?? 0,
    softCap: args.softCap ?? 0,
    logitScale: args.logitScale ?? 1,
  };
  const label = labels.data<Int32Array>();
  const rows = new Int32Array(n); // rows that count, in order
  let supervised = 0;
  for (let i = 0; i < n; i++) {
    const y = label[i] as number;
    if (y === options.ignoreIndex) continue;
    if (y < 0 || y >= vocab) {
      throw new LcTypeError(
        'ERR_LC_ARGUMENT',
        `chunkedCrossEntropy: labels[${i}] is ${y}, expected 0..${vocab - 1} or ignoreIndex ${options.ignoreIndex}`,
      );
    }
    rows[supervised++] = i;
  }
  const numTokens = args.numTokens ?? Math.max(1, supervised);
  checkOptions(options, numTokens);
  const chunkSize = chunkRows(chunk, Math.max(1, supervised), vocab, width, hidden.device);
  const gradient = dHidden !== null || dWeight !== null || dBias !== null;
  const weights = tokenWeights?.data();
  if (lossPerToken) fill(lossPerToken, 0);

  const onGpu = hidden.device.startsWith('cuda');
  let loss = 0; // f64, in token order
  let cleared = 0; // rows of dHidden that are done, one way or the other
  ws.scoped(() => {
    const logits = ws.alloc([chunkSize, vocab], 'f32');
    // On a GPU the gradient takes the first half of each row of logits, as bf16: what the next GEMM wants.
    const dLogits = onGpu ? logits.reinterpret('bf16', [chunkSize, 2 * vocab]).slice(1, 0, vocab) : logits;
    const gathered = ws.alloc([chunkSize, width]);
    const dGathered = dHidden ? ws.alloc([chunkSize, width]) : null;
    const index = ws.alloc([chunkSize], 'i32');
    const target = ws.alloc([chunkSize], 'i32');
    const rowLoss = ws.alloc([chunkSize], 'f32');
    const rowWeight = weights ? ws.alloc([chunkSize], 'f32') : null;
    const sum = onGpu ? (lossSum ?? ws.zeros([2], 'f32')) : null;
    for (let at = 0; at < supervised; at += chunkSize) {
      const m = Math.min(chunkSize, supervised - at);
      const part = rows.subarray(at, at + m);
      const [first, last] = [part[0] as number, part[m - 1] as number];
      const dense = last - first + 1 === m; // nothing is ignored in between: no gather needed
      const z = logits.rows(0, m);
      const dz = dLogits.rows(0, m);
      const ids = index.rows(0, m);
      upload(ids, part);
      upload(
        target.rows(0, m),
        part.map((row) => label[row] as number),
      );
      if (rowWeight && weights)
        upload(
          rowWeight.rows(0, m),
          Float32Array.from(part, (row) => weights[row] as number),
        );
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
      if (!onGpu) for (const value of rowLoss.rows(0, m).data()) loss += value;
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
    if (sum) loss = lossSum ? Number.NaN : readLossSum(sum);
  });
  if (dHidden && cleared < n) fill(dHidden.rows(cleared, n - cleared), 0);
  return { loss: loss / numTokens, supervised, gemmRows: supervised, chunkRows: chunkSize };
}

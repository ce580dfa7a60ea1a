/** What is checked of a call's tensors and labels before anything is computed. */
import { type LcErrorCode, LcTypeError, type Tensor } from '@lc/tensor';
import type { ChunkedCrossEntropyArgs } from './chunked-ce.js';

const same = (t: Tensor, shape: readonly number[]): boolean => t.shape.length === shape.length && shape.every((s, i) => s === t.shape[i]);

/** @throws ERR_LC_SHAPE, ERR_LC_DTYPE, ERR_LC_DEVICE, ERR_LC_ARGUMENT */
export function checkArguments(args: ChunkedCrossEntropyArgs): { n: number; width: number; vocab: number } {
  const { hidden, weight, bias, labels, tokenWeights, dHidden, dWeight, dBias, lossPerToken, lossSum, ws } = args;
  const fail = (code: LcErrorCode, name: string, want: string, got: unknown): never => {
    throw new LcTypeError(code, `chunkedCrossEntropy: ${name} must be ${want}, got ${String(got)}`);
  };
  if (hidden.shape.length !== 2) fail('ERR_LC_SHAPE', 'hidden', '[n, hidden]', hidden);
  const [n, width] = hidden.shape as [number, number];
  if (weight.shape.length !== 2 || weight.shape[1] !== width || weight.shape[0] === 0)
    fail('ERR_LC_SHAPE', 'weight', `[vocab, ${width}]`, weight);
  const vocab = weight.shape[0] as number;
  const tensors: [string, Tensor | null | undefined, readonly number[]][] = [
    ['labels', labels, [n]],
    ['tokenWeights', tokenWeights, [n]],
    ['bias', bias, [vocab]],
    ['dHidden', dHidden, [n, width]],
    ['dWeight', dWeight, [vocab, width]],
    ['dBias', dBias, [vocab]],
    ['lossPerToken', lossPerToken, [n]],
    ['lossSum', lossSum, [2]],
  ];
  for (const [name, t, shape] of tensors) if (t && !same(t, shape)) fail('ERR_LC_SHAPE', name, `[${shape.join(', ')}]`, t);
  if (labels.dtype !== 'i32') fail('ERR_LC_DTYPE', 'labels', 'i32', labels);
  for (const [name, t] of Object.entries({ tokenWeights, dWeight, dBias, lossPerToken, lossSum }))
    if (t && t.dtype !== 'f32') fail('ERR_LC_DTYPE', name, 'f32', t);
  // The host decides which rows are scored, so what it decides by lies with it; all else is where hidden is.
  for (const [name, t] of Object.entries({ labels, tokenWeights }))
    if (t?.device.startsWith('cuda')) fail('ERR_LC_DEVICE', name, "on the CPU or 'host'", `${t} on ${t.device}`);
  const side = (device: string): string => (device.startsWith('cuda') ? device : 'cpu');
  for (const [name, device] of Object.entries({ weight, bias, dHidden, dWeight, dBias, lossPerToken, lossSum, ws }).map(([k, t]) => [
    k,
    t?.device,
  ]))
    if (name && device && side(device) !== side(hidden.device))
      fail('ERR_LC_DEVICE', name, `on ${hidden.device}, as hidden is`, `one on ${device}`);
  if (dHidden && overlapsElsewhere(hidden, dHidden))
    fail('ERR_LC_ARGUMENT', 'dHidden', 'hidden itself or apart from it', 'a view that overlaps it with an offset');
  return { n, width, vocab };
}

/** Whether two views of one allocation share bytes without being the same view. */
function overlapsElsewhere(a: Tensor, b: Tensor): boolean {
  if (a.handle !== b.handle || a.numel === 0) return false;
  if (a.byteOffset === b.byteOffset && a.strides.every((stride, i) => stride === b.strides[i])) return false;
  const end = (t: Tensor): number => {
    const [rows, width] = t.shape as [number, number];
    return t.byteOffset + (((rows - 1) * (t.strides[0] as number) + width) * t.nbytes) / t.numel;
  };
  return a.byteOffset < end(b) && b.byteOffset < end(a);
}

/** Rows that are not ignored, in order. @throws ERR_LC_ARGUMENT naming a row whose label is outside the vocabulary or whose weight is not finite */
export function supervisedRows(labels: Int32Array, weights: Float32Array | undefined, ignoreIndex: number, vocab: number): Int32Array {
  const rows = new Int32Array(labels.length);
  let count = 0;
  for (let i = 0; i < labels.length; i++) {
    const y = labels[i] as number;
    if (y === ignoreIndex) continue;
    if (y < 0 || y >= vocab) {
      throw new LcTypeError(
        'ERR_LC_ARGUMENT',
        `chunkedCrossEntropy: labels[${i}] is ${y}, expected 0..${vocab - 1} or ignoreIndex ${ignoreIndex}; a tokenizer of another model gives such ids`,
      );
    }
    if (weights && !Number.isFinite(weights[i]))
      throw new LcTypeError('ERR_LC_ARGUMENT', `chunkedCrossEntropy: tokenWeights[${i}] is ${weights[i]}, expected a finite number`);
    rows[count++] = i;
  }
  return rows.subarray(0, count);
}
